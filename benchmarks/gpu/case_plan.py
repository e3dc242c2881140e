"""What ``vipo plan`` says of a case: bytes at worst, and the operations of the passes that case_run.py times. CPU only.

python benchmarks/gpu/case_plan.py --case flux --size full --out plan-flux.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from published_cases import CASES, CREDITS
from records import write
from vipo.plan import Ledger, Machine, Plan, plan
from vipo.plan.work import work_of

ENCODERS = "text encoders"
NOWHERE = Path("random")  # a backbone's weights are not read


def without_text(found: Plan) -> int:
    """The peak without text encoders, which are not loaded: wherever they are."""
    resident, *phases = ({**part, ENCODERS: 0} for part in (found.resident, *found.phases.values()))
    return sum(resident.values()) + max(sum(phase.values()) for phase in phases)


def planned(size: str, case: str) -> dict[str, Any]:
    """Peaks by credit, shares of an iteration, and operations of one batch."""
    ledger, peaks = Ledger(), {}
    for credit in CREDITS:
        found = plan(recipe := CASES[size][case].load(credit, NOWHERE), Machine(), ledger)
        peaks[credit] = without_text(found)
    work = work_of(recipe, 1)
    return {
        "peak_bytes": peaks,
        "iteration_seconds": dict(found.seconds),
        "utilisation": Machine().utilisation,
        "forward_flops": ledger.cost(recipe, "sampling", work.sampled_at_once).flops,
        "forward_backward_flops": ledger.cost(recipe, "replaying", work.replayed_at_once).flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True)
    parser.add_argument("--size", choices=CASES, default="full")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.out, planned(args.size, args.case))


if __name__ == "__main__":
    main()
