import re
from pathlib import Path

import pytest
import yaml

from lwfed.config import RunConfig, load_config, presets
from lwfed.config.explain import keys
from lwfed.config.learning import learning_digest
from lwfed.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_the_wire(name):
    config = load_config(name)
    assert RunConfig.from_bytes(config.to_bytes()) == config
    assert config.digest == load_config(name).digest


def test_base_states_every_key_with_a_comment():
    text = (CONFIGS / "base.yaml").read_text()
    stated = [f"{section}.{key}" for section, values in yaml.safe_load(text).items() for key in values]
    assert sorted(stated) == sorted(keys(RunConfig))
    for line in text.splitlines():
        if re.match(r"  \w+:", line) and not re.match(r"  (contrast|saturation):", line):
            assert "#" in line, f"no reason given: {line}"


@pytest.mark.parametrize("path", [path for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml"], ids=lambda path: path.stem)
def test_presets_state_differences_only(path):
    base = load_config("base").model_dump(mode="json")
    for section, values in yaml.safe_load(path.read_text()).items():
        config = load_config(path.stem).model_dump(mode="json")
        for key in values:
            assert config[section][key] != base[section][key], f"{path.name} repeats base.yaml's {section}.{key}"


def test_the_paper_preset_is_the_paper():
    config = load_config("paper")
    assert (config.round_counts, config.train.epochs, config.train.batch_size) == ((15,) * 12, 3, 512)
    assert load_config("paper", ["stages.strategy=end_to_end"]).round_counts == (180,)


def test_settings_are_typed_like_yaml_and_the_last_one_wins():
    config = load_config("demo", ["train.lr=3e-3", "train.epochs=1", "train.epochs=2", "views.blur=[0.5, 0]", "calibration.every=never"])
    assert config.train.lr == 0.003
    assert config.train.epochs == 2
    assert config.views.blur == (0.5, 0.0)


def test_all_problems_are_listed_at_once_with_the_nearest_key():
    with pytest.raises(ConfigError) as caught:
        load_config(
            "demo",
            ["trian.lr=1", "train.lrr=1", "train.leanring_rate=1", "batch_size=3", "train.epochs=no", "model.heads=5", "train.lr=.inf"],
        )
    text = str(caught.value)
    assert "7 problems" in text
    for expected in (
        "trian: no such key; did you mean train",
        "train.lrr: no such key; did you mean train.lr?",
        "train.leanring_rate: no such key; train has epochs, batch_size, lr,",
        "batch_size: no such key; did you mean train.batch_size?",
        "train.epochs: ",
        "heads 5 does not divide width 64",
        "train.lr: ",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1}\ntrain: {lr: 2}", "given twice"),
        ("- a\n- b", "sections of keys"),
        ("a: [", "no valid YAML"),
        ("1: 2", "not a word"),
        ("train: 5", "train"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
        ("calibration: {every: round}", "needs auxiliary images"),
        ("stages: {on_collapse: repeat}", "needs images on the server to judge a stage by"),
        ("data: {auxiliary_share: 0.6, labelled_share: 0.4}", "leave nothing"),
        ("stages: {layers_per_stage: 13}", "exceeds model.depth"),
        ("rounds: {sample: 5, min_devices: 2}", "exceeds rounds.min_devices"),
        ("rounds: {min_devices: 2001}", "min_devices"),
        ("rounds: {oversample: 1.3}", "oversample 1.3 adds to rounds.sample, which is null"),
        ("rounds: {straggler_factor: 0.5}", "rounds.straggler_factor"),
        ("run: {name: 2026-13-45}", "no valid YAML|run.name"),
        ("run: {seed: 0b_}", "no valid YAML|run.seed"),
        ("ssl: {temperature: 1e-7}", "ssl.temperature"),
        ("train: {epochs: 20000}", "train.epochs"),
        ("stages: {rounds_per_stage: 2000000}", "stages.rounds_per_stage"),
        ("rounds: {deadline_s: 1e10}", "rounds.deadline_s"),
        ("views: {crop_scale: [1.0, 0.2]}", "no range"),
        ("stages: {overlap: 12}", "overlap 12 is no fewer than the 12 layers"),
        ("calibration: {every: 16, data: digits}", "would never come: it counts the rounds of a stage, at most 15"),
        ("aggregation: {rule: trimmed_mean}", "rule trimmed_mean needs trim: set aggregation.trim"),
        ("aggregation: {rule: multi_krum}", "rule multi_krum needs byzantine: set aggregation.byzantine"),
        ("aggregation: {trim: 0.1}", "trim 0.1 does nothing under rule mean: leave it out, or set rule to trimmed_mean"),
        (
            "aggregation: {rule: median, byzantine: 1}",
            "byzantine 1 does nothing under rule median: leave it out, or set rule to krum or",
        ),
        ("aggregation: {rule: krum, byzantine: 2}\nrounds: {sample: 6, min_devices: 9}", "byzantine 2 needs 7 updates in a round"),
        ("train: {warmup_rounds: 180}", "nothing of the 180 rounds of the run"),
        ("train: {warmup_rounds: 15, lr_schedule: cosine_per_stage}", "nothing of the 15 rounds of a stage"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("run=5", "run: must be a section of keys, not a value (got 5)"),
        ("train.epochs=many", "train.epochs: must be a whole number (got 'many')"),
        ("train.epochs=1.5", "train.epochs: must be a whole number (got 1.5)"),
        ("train.epochs=0", "train.epochs: must be at least 1 (got 0)"),
        ("train.lr=fast", "train.lr: must be a number (got 'fast')"),
        ("train.lr=.inf", "train.lr: must be a finite number (got inf)"),
        ("train.lr=0", "train.lr: must be more than 0 (got 0)"),
        ("ssl.momentum=1", "ssl.momentum: must be less than 1 (got 1)"),
        ("model.image_size=5000", "model.image_size: must be at most 1024 (got 5000)"),
        ("run.name=Big Name", "run.name: must be 1 to 64 of a-z, 0-9 and - (got 'Big Name')"),
        ("calibration.data=3", "calibration.data: must be text (got 3)"),
        ("evaluation.probe=maybe", "evaluation.probe: must be true or false (got 'maybe')"),
        ("model.channels=2", "model.channels: must be 1 or 3 (got 2)"),
        ("views.blur=3", "views.blur: must be a list (got 3)"),
        ("calibration.every=rounds", "calibration.every: must be 'round', 'stage' or 'never', or a whole number (got 'rounds')"),
        ("calibration.every=true", "calibration.every: must be 'round', 'stage' or 'never', or a whole number (got True)"),
        ("stages.rounds_per_stage=0", "stages.rounds_per_stage: must be at least 1, or a list (got 0)"),
        ("stages.layers_per_stage=[2, x]", "stages.layers_per_stage: must be a whole number (got [2, 'x'])"),
        ("train.micro_batch=yes", "train.micro_batch: must be a whole number, or 'auto' (got True)"),
        ("aggregation.trim=0.5", "aggregation.trim: must be less than 0.5 (got 0.5)"),
        ("aggregation.byzantine=0", "aggregation.byzantine: must be at least 1 (got 0)"),
        ("aggregation.clip_norm=mean", "aggregation.clip_norm: must be a number, or 'median' (got 'mean')"),
        ("aggregation.clip_norm=0", "aggregation.clip_norm: must be more than 0, or 'median' (got 0)"),
        ("train.lr=true", "train.lr: must be a number (got True)"),
        ("views.blur=[1, 2, 3]", "views.blur: must have at most 2 values (got [1, 2, 3])"),
    ],
)
def test_values_are_objected_to_in_plain_words(setting, line):
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [setting])
    assert str(caught.value).splitlines() == ["demo: 1 problem", f"  {line}"]


def test_a_misspelt_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean the preset 'demo'"):
        load_config("demmo")
    with pytest.raises(ConfigError, match="presets: base"):
        load_config("/nowhere/at/all.yaml")


def test_a_setting_without_value_is_explained():
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config("demo", ["train.lr"])


def test_junk_from_the_network_is_a_config_error():
    for junk in (b"", b"[]", b"{", b"\xff\x00", b'{"run": 1}', b'{"train": {"lr": NaN}}', b"[" * 9999):
        with pytest.raises(ConfigError, match="the server's configuration"):
            RunConfig.from_bytes(junk)


def test_a_stage_that_is_repeated_goes_through_its_part_of_the_schedule_once_more():
    config = load_config("demo")
    rounds = config.round_counts[1]
    assert config.place(2, rounds + 1) == config.place(2, 1)
    assert config.place(2, 2 * rounds) == config.place(2, rounds)
    assert config.place(2, rounds) != config.place(2, 1)


@pytest.mark.parametrize(
    ("setting", "learns"),
    [
        ("run.name=other", True),
        ("train.lr=0.3", True),
        ("transfer.codec=bf16", True),
        ("transfer.top_k=0.5", True),
        ("rounds.deadline_s=7", False),
        ("transfer.window=2", False),
        ("worker.linger_s=1", False),
    ],
)
def test_the_digest_of_what_a_run_learns_outlasts_changes_of_how_it_proceeds(setting, learns):
    before, after = load_config("demo"), load_config("demo", [setting])
    assert before.digest != after.digest
    assert (learning_digest(before) != learning_digest(after)) == learns
