"""Plans as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import sd1_pair

from bake.api import build_plan
from bake.plan.model import Plan
from bake.plan.recipe import AdapterChoice


def test_a_plan_survives_json(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    plan = build_plan(base, [AdapterChoice(lora, 0.5, te=1.0, rank_limit=1)], metadata={"note": "x"})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest() == plan.digest()


def test_plans_of_different_weights_differ(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    assert build_plan(base, [(lora, 0.5)]).digest() != build_plan(base, [(lora, 0.6)]).digest()


def test_a_plan_of_another_schema_is_refused(tmp_path: Path) -> None:
    base, lora, _ = sd1_pair(tmp_path)
    data = build_plan(base, [lora]).to_json()
    with pytest.raises(ValueError, match="schema 99"):
        Plan.from_json({**data, "schema": 99})
