"""Tests of `trainer/config.py`: recipes in, one valid RunConfig or one helpful message out."""

from pathlib import Path

import pytest
import yaml

from datastore.errors import AskedWrongly
from trainer.config import load_recipe, parse_assignments, read_config
from trainer.recipes import known_jobs, recipe_path

EVERY_RECIPE = [(job, demo) for demo in (False, True) for job in known_jobs(demo=demo)]


@pytest.mark.parametrize(("job", "demo"), EVERY_RECIPE)
def test_every_recipe_that_we_ship_is_valid(job: str, demo: bool) -> None:
    config = load_recipe(job, demo=demo)
    assert config.job == job


@pytest.mark.parametrize(("job", "demo"), EVERY_RECIPE)
def test_a_config_written_as_yaml_reads_back_the_same(job: str, demo: bool) -> None:
    config = load_recipe(job, demo=demo)
    again = read_config(config.to_yaml(), name="copy")
    assert again == config
    assert again.hash() == config.hash()


def test_every_demo_recipe_has_a_published_twin() -> None:
    assert set(known_jobs(demo=True)) <= set(known_jobs(demo=False))


def test_an_objective_that_needs_one_kind_of_student_says_which() -> None:
    with pytest.raises(AskedWrongly, match=r"'i2p_mae' needs a student of kind masked_transformer: .* 'pointnet'"):
        load_recipe("i2p_mae", demo=False, assignments=["student={kind: pointnet}"])


def test_an_unknown_job_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        AskedWrongly,
        match=r"Unknown job 'pointmdc'. Did you mean 'pointmcd'\? Known jobs: .*pointmcd, .*pointmcd_teacher",
    ):
        recipe_path("pointmdc", demo=True)


def test_a_job_without_a_small_variant_says_what_it_needs() -> None:
    with pytest.raises(
        AskedWrongly, match=r"'pointmcd_dgcnn' has the paper's settings alone, .* with --data.*pointmcd,"
    ):
        recipe_path("pointmcd_dgcnn", demo=True)


def test_a_missing_recipe_file_is_named() -> None:
    with pytest.raises(AskedWrongly, match=r"no recipe file './nowhere.yaml'"):
        recipe_path("./nowhere.yaml", demo=False)


def test_a_recipe_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_path("pointmcd", demo=True).read_text())
    assert load_recipe(str(path), demo=False).job == "mine"


def test_assignments_replace_single_values() -> None:
    config = load_recipe(
        "pointmcd", demo=True, assignments=["engine.optimizer.lr=1e-3", "seed=7", "engine.zero_stage=3"]
    )
    assert config.engine.optimizer.lr == 1e-3
    assert config.seed == 7
    assert config.engine.zero_stage == 3
    untouched = load_recipe("pointmcd", demo=True)
    assert config.objective == untouched.objective


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("global_batch=many", r"global_batch: .*integer.*got 'many'"),
        ("engine.optimizer.lr=-1", r"engine.optimizer.lr: .*greater than 0"),
        ("objective.alignment_weigth=1", r"unknown key 'objective.alignment_weigth'. Did you mean 'alignment_weight'"),
        ("engine.optimiser.lr=1", r"unknown key 'engine.optimiser'. Did you mean 'optimizer'"),
        ("student.widht=1", r"unknown key 'student.widht'. Did you mean 'width'"),
        ("global_bach=4", r"unknown key 'global_bach'. Did you mean 'global_batch'"),
        ("global_batch.x=4", r"'global_batch' has nothing below 'global_batch': its value is 32"),
        ("seed", r"--set takes key=value"),
        ("seed=[", r"--set seed: the value '\[' is not valid YAML"),
        ("objective.kind=pointmdc", r"objective: .*'pointmdc'"),
        ("steps=10", r"exactly one of 'epochs' and 'steps'"),
        ("student=null", r"add a 'student' section"),
        ("comparisons.off={objective.alignment_wait: 0}", r"comparison 'off'.*unknown key 'objective.alignment_wait'"),
    ],
)
def test_a_wrong_assignment_is_answered_with_what_where_and_how(assignment: str, message: str) -> None:
    with pytest.raises(AskedWrongly, match=f"(?s){message}"):
        load_recipe("pointmcd", demo=True, assignments=[assignment])


def test_a_misspelt_key_in_a_recipe_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    tree = yaml.safe_load(recipe_path("pointmcd", demo=True).read_text())
    tree["obective"] = tree.pop("objective")
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        AskedWrongly, match=r"(?s)mine.yaml.*unknown key 'obective'. Did you mean 'objective'"
    ) as caught:
        load_recipe(str(path), demo=False)
    assert "'objective' is missing" in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_text_that_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(AskedWrongly, match=r"draft (is not valid YAML|must be a mapping)"):
        read_config(text, name="draft")


def test_the_hash_follows_what_is_learned_and_not_where_or_how_it_runs() -> None:
    base = load_recipe("pointmcd", demo=True).hash()
    for same in (
        "engine.zero_stage=3",
        "engine.max_micro_batch=4",
        "metrics.port=9000",
        "data.store_url=s3://elsewhere/x.zarr",
    ):
        assert load_recipe("pointmcd", demo=True, assignments=[same]).hash() == base, same
    for other in ("seed=1", "engine.optimizer.lr=0.5", "objective.alignment_weight=0", "global_batch=64", "epochs=3"):
        assert load_recipe("pointmcd", demo=True, assignments=[other]).hash() != base, other


def test_an_arm_is_the_same_run_with_one_thing_changed() -> None:
    config = load_recipe("pointmcd", demo=True)
    arm = config.with_overrides(config.comparisons["distillation_off"])
    assert arm.comparisons == {}
    changed = {key for key, value in arm.identity().items() if value != config.identity()[key]}
    assert changed == {"objective"}


def test_the_length_of_a_run_is_given_in_epochs_or_steps() -> None:
    assert load_recipe("pointmcd", demo=True, assignments=["epochs=3"]).total_steps(7) == 21
    assert load_recipe("pointmcd", demo=True, assignments=["epochs=null", "steps=5"]).total_steps(7) == 5


def test_numbers_in_scientific_notation_are_numbers() -> None:
    assert parse_assignments(["a=1e-3", "b=2", "c=word", "d=true"]) == {"a": 1e-3, "b": 2, "c": "word", "d": True}


def test_ranks_wait_for_each_other_as_long_as_one_may_wait_for_its_data() -> None:
    with pytest.raises(
        AskedWrongly, match=r"collective_timeout_seconds is 120, and one rank may wait 160 s"
    ) as refused:
        load_recipe("pointmcd", demo=True, assignments=["engine.collective_timeout_seconds=120"])
    assert "data.fetch.retry_seconds" in str(refused.value)
    lowered = ["engine.collective_timeout_seconds=120", "data.fetch.retry_seconds=60"]
    assert load_recipe("pointmcd", demo=True, assignments=lowered).data_wait_seconds == 100
