"""A run keeps the LoRA that its policy began with, in ``init/``: its ranks and scales, and what it is compared with.

So a run goes on, and is sampled, evaluated and exported, also where that file is gone or another by then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vipo.files import remove, written_whole
from vipo.schema import Recipe

INIT = "init"


def keep_init(recipe: Recipe, root: Path, *, anew: bool) -> None:
    """Copy what ``policy.init`` names into the run's folder; of a run that goes on it is there already.

    Args:
        anew: the run begins, so that what is there belongs to one that never came to its first iteration.
    """
    kept, named = root / INIT, recipe.policy.init
    if anew:
        remove(kept)
    if named is None or kept.is_dir():
        return
    from vipo.generators.lora_file import SETTINGS, weights_file  # PEFT takes seconds
    from vipo.generators.lora_start import lora_place

    file = weights_file(lora_place(named))
    with written_whole(kept) as aside:
        aside.mkdir()
        for one in (file, file.with_name(SETTINGS)):
            if one.is_file():
                shutil.copyfile(one, aside / one.name)


def with_kept_init(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with the run's own copy of what its policy began with, if there is one."""
    kept = root / INIT
    if recipe.policy.init is None or not kept.is_dir():
        return recipe
    return recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"init": str(kept)})})
