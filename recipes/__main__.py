"""`python -m recipes`: lists the commands, each of which is a module of its own."""

from recipes.commands import COMMANDS

print("Run from a checkout; --help after a command lists its options:")
for name, text in COMMANDS.items():
    print(f"  {f'python -m recipes.{name}':<28}{text}")
