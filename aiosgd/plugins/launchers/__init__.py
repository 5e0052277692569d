"""Launchers: bring up nodes, say where they are, take them down again.

`base` is the file for authors; `processes` is for launchers whose nodes hang on processes of this
machine, as those of `local` and `ssh` do.
"""

from aiosgd.plugins.launchers.base import Launched, Launcher, Printed, Wanted, ignore
from aiosgd.plugins.launchers.local import Local

__all__ = ["Launched", "Launcher", "Local", "Printed", "Wanted", "ignore"]
