"""The architectures Fresco knows: one module each with the same function names, registered here by name.

To add one, write `families/NAME.py` with what the two below have (docs/families.md) and add it to `FAMILIES`.
"""

from types import ModuleType

from components.families import stable_diffusion, z_image

FAMILIES: dict[str, ModuleType] = {family.NAME: family for family in (stable_diffusion, z_image)}
