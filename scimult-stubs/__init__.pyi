# Type checkers ignore py.typed for a module that is one file, so its types come in a package of stubs (PEP 561).
from datamodules import *  # noqa: F403
from lightning_modules import *  # noqa: F403

__version__: str
