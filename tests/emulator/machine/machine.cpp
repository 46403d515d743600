// The door to Python: emulator/machine.py calls what is exported here.
#include "memory_access.hpp"
#include "schedule.hpp"
#include "tensor_core.hpp"

// A kernel as emulator/ptx.py lays it out, and a launch of it; all arrays are borrowed.
struct Launch {
    const Instruction* code;
    const s64* lists;
    const Preset* presets;
    const u64 *parameters, *starts, *sizes;
    s64 length, slots, threads, preset_count, range_count, shared_granule, global_granule, grid[3];
    Options options;
};

extern "C" {

const char* names() {
    static const std::string all = vocabulary();
    return all.c_str();
}

// Returns how many reports there are, of which `most` at most are written.
s64 launch(const Launch* given, Counts* counts, Report* reports, s64 most) {
    auto machine = std::make_unique<Machine>();
    machine->code = given->code, machine->lists = given->lists, machine->length = int(given->length);
    machine->slots = int(given->slots), machine->threads = int(given->threads);
    machine->shared_granule = int(given->shared_granule);
    machine->options = given->options, machine->random.state = u64(given->options.seed);
    for (int k = 0; k < 3; ++k) machine->grid[k] = given->grid[k];
    machine->global.set(given->starts, given->sizes, int(given->range_count), int(given->global_granule),
                        given->options.track, &machine->reports);
    machine->presets.assign(given->presets, given->presets + given->preset_count);
    machine->image.assign(given->slots * 32, ~0u);  // registers that nobody wrote hold NaN
    for (const Preset& p : machine->presets) {
        if (p.kind == SPECIAL) continue;
        u64 value = p.kind == PARAMETER ? given->parameters[p.value] : u64(p.value);
        u32* slot = &machine->image[p.slot * 32];
        for (int l = 0; l < 32; ++l)
            if (p.width == 8) put<u64>(slot, l, value);
            else slot[l] = u32(value);
    }
    machine->run();
    *counts = machine->counts;
    s64 at = 0;
    for (const auto& [key, report] : machine->reports.found) {
        if (at < most) reports[at] = report;
        at++;
    }
    return at;
}
}
