"""The modules: layers, stages, their BNs, the stem."""
