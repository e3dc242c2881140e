"""The package as somebody meets it who types ``import vipo``."""

from __future__ import annotations

import vipo


def test_dir_lists_what_vipo_offers_and_all_of_it_is_there() -> None:
    offered = {name for name in dir(vipo) if not name.startswith("_")}
    assert offered == {"PerceptualStructuring", "build", "load_recipe", "objective", "sde", "structuring", "train"}
    assert all(getattr(vipo, name) is not None for name in dir(vipo))
    assert set(vipo.__all__) <= set(dir(vipo))
