"""What a recipe will need before it runs: memory per accelerator, phase by phase, and time; and what to change if it is
too much.

Sizes come from the model's published configuration, passes are measured by running the real networks on tensors without
storage (:mod:`vipo.plan.blueprint`), so a 14-billion model is planned on a laptop. Nothing is downloaded or trained.
"""

from vipo.plan.account import Machine, Plan, plan
from vipo.plan.advice import Advice, advise
from vipo.plan.batches import Batches, propose
from vipo.plan.ledger import Ledger

__all__ = ["Advice", "Batches", "Ledger", "Machine", "Plan", "advise", "plan", "propose"]
