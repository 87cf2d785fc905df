"""Trigger words and training facts, from metadata that nobody vouches for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.identify.training import FACTS, training_of

TAGS = {"10_sks dog": {"sks dog": 40, "grass": 12, "outdoors": 12}, "1_dog": {"grass": 3}, "plain": {"sky": 1}}


def texts(metadata: dict[str, str]) -> list[str]:
    return [trigger.text for trigger in training_of(metadata).triggers]


def test_image_folders_carry_the_instance_words() -> None:
    found = training_of({"ss_tag_frequency": json.dumps(TAGS)})
    assert [tuple(trigger) for trigger in found.triggers] == [
        ("sks dog", "ss_tag_frequency: 10_sks dog"),
        ("dog", "ss_tag_frequency: 1_dog"),
    ]


def test_tags_are_counted_over_all_folders_and_ties_are_in_order_of_the_alphabet() -> None:
    found = training_of({"ss_tag_frequency": json.dumps(TAGS)})
    assert found.tags == (("sks dog", 40), ("grass", 15), ("outdoors", 12), ("sky", 1))


def test_what_the_author_wrote_comes_first_and_nothing_twice() -> None:
    metadata = {
        "modelspec.trigger_phrase": "SKS dog, on grass",
        "ss_tag_frequency": json.dumps(TAGS),
        "trigger_word": "Dog",
    }
    assert texts(metadata) == ["SKS dog, on grass", "Dog", "sks dog"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"trigger_word": "p3rs0n"},
        {"trigger_words": '["p3rs0n"]'},
        {"instance_prompt": " p3rs0n\n"},
        {"ss_dataset_dirs": '{"3_p3rs0n": {"n_repeats": 3, "img_count": 20}}'},
        {"ss_datasets": '[{"subsets": [{"img_count": 1, "class_tokens": "p3rs0n"}]}]'},
        {"ss_tag_frequency": '{"1_p3rs0n": {"p3rs0n": 1}}'},
    ],
)
def test_every_trainer_has_its_own_place_for_them(metadata: dict[str, str]) -> None:
    assert texts(metadata) == ["p3rs0n"]


def test_facts_come_from_the_first_tool_that_wrote_them() -> None:
    kohya = {
        "ss_output_name": "style",
        "ss_sd_model_name": "v1-5.safetensors",
        "ss_training_started_at": "1726066908.2",
        "ss_training_comment": "None",
        "ss_steps": "740",
        "ss_max_train_steps": "2000",
    }
    assert training_of(kohya).facts == {
        "title": "style",
        "base_model": "v1-5.safetensors",
        "steps": "740",
        "date": "2024-09-11 15:01 UTC",
    }
    toolkit = {"training_info": '{"step": 500, "epoch": 3}', "software": '{"name": "ai-toolkit", "version": "0.1.0"}'}
    assert training_of(toolkit).facts == {
        "steps": "500",
        "epochs": "3",
        "software": "ai-toolkit",
        "software_version": "0.1.0",
    }


def test_a_software_that_is_no_json_is_told_as_it_stands() -> None:
    found = training_of({"software": "my trainer"})
    assert found.facts == {"software": "my trainer"}
    assert found.unread == ()


@pytest.mark.parametrize(
    "bomb",
    [
        "[" * 100_000,
        "{" + '"a":{' * 50_000,
        "9" * 1_000_000,
        "null",
        "[1, 2]",
        '{"a": [1], "b": {"c": "d"}}',
        "\0",
        "{}" * 9,
    ],
)
def test_hostile_values_neither_raise_nor_hang(bomb: str) -> None:
    keys = ("ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "training_info", "trigger_words", "ss_steps")
    found = training_of(dict.fromkeys(keys, bomb))
    assert all(len(text) <= 200 for text in (*found.facts.values(), *(trigger.text for trigger in found.triggers)))


def test_what_is_too_long_to_read_is_said() -> None:
    (reason,) = training_of({"ss_tag_frequency": "{" + " " * 3_000_000 + "}"}).unread
    assert reason.startswith("ss_tag_frequency: 3000002 characters")


@given(st.dictionaries(st.sampled_from([key for fact in FACTS for key in fact.keys] + ["ss_tag_frequency"]), st.text()))
def test_any_text_under_any_key_is_survived(metadata: dict[str, str]) -> None:
    json.dumps(training_of(metadata).to_json())
