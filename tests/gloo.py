"""FSDP2 on a CPU, for tests: ``python gloo.py SCRIPT ...`` or, as ``vipo``'s command line, ``python gloo.py -m vipo ...``.

Accelerate 1.15 takes an FSDP plugin on accelerators only. All that keeps its FSDP2 code from running over gloo is the
kind of processes that its state notes down, so that is what is put right here, and nothing else.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Let a plugin that is given count on a CPU too."""
    begin = AcceleratorState.__init__

    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin  # type: ignore[method-assign]


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
