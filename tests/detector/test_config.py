"""The options: defaults, bases, --set, and one line for every mistake."""

import itertools
import warnings

import pytest
import yaml

from detector import config, config_files
from detector.config import Config
from detector.config_files import merge
from detector.configure import complete, configure
from detector.errors import UserError


@pytest.fixture
def error_of(tmp_path):
    """Gives the one-line message that refuses a config text with these settings."""

    def message(text: str, *settings: str) -> str:
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            configure(str(tmp_path / "x.yaml"), list(settings))
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


def load(tmp_path, text: str, *settings: str) -> Config:
    (tmp_path / "x.yaml").write_text(text)
    return configure(str(tmp_path / "x.yaml"), list(settings))


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "---\n"])
def test_an_empty_file_is_the_defaults(tmp_path, text):
    assert load(tmp_path, text) == complete(Config(), "defaults")


def test_defaults_are_the_recipe_of_the_paper():
    cfg = complete(Config(), "defaults")
    assert (cfg.data.short_side, cfg.data.long_side) == (800, 1333)
    assert (cfg.solver.lr, cfg.solver.batch_size, cfg.solver.epochs, cfg.solver.weight_decay) == (0.01, 16, 12, 1e-4)
    assert cfg.model.frozen_stages == 1 and cfg.model.norm == "frozen_bn"
    assert cfg.class_loss.options == {"alpha": 0.25, "gamma": 2.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slover: {lr: 1}", "slover: unknown option; did you mean 'solver'?"),
        ("solver: {lrr: 1}", "solver.lrr: unknown option; did you mean 'lr'?"),
        ("data: {train: {anotations: x}}", "data.train.anotations: unknown option; did you mean 'annotations'?"),
        ("model: {head: {widht: 64}}", "model.head.widht: unknown option; did you mean 'width'?"),
        ("class_loss: {name: focal, gama: 1}", "class_loss.gama: unknown option; did you mean 'gamma'?"),
        ("class_loss: {name: focal, wieght: 1}", "class_loss.wieght: unknown option; did you mean 'weight'?"),
        ("anchors: {name: grid, size: [1]}", "anchors.size: unknown option; did you mean 'sizes'?"),
        ("lr: 1", "lr: unknown option; did you mean solver.lr?"),
        ("solver: {norm: bn}", "solver.norm: unknown option; did you mean model.norm or model.head.norm?"),
        ("class_loss: {name: ghmc}", "class_loss.name: no 'ghmc'; did you mean 'ghm_c'?"),
        ("model: {backbone: resnet5}", "model.backbone: no 'resnet5'; did you mean 'resnet50'?"),
        ("box_loss: {name: l1, zzz: 1}", "box_loss.zzz: unknown option; it may be one of name, weight"),
        ("data: {train: {zzz: x}}", "data.train.zzz: unknown option; it may be one of annotations, images"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(error_of, tmp_path, text, expected):
    assert error_of(text) == f"{tmp_path / 'x.yaml'}: {expected}"


@pytest.mark.parametrize(
    ("text", "key", "found"),
    [
        ("solver: {lr: fast}", "solver.lr", "fast"),
        ("solver: {lr: 0}", "solver.lr", "0"),
        ("solver: {lr: .nan}", "solver.lr", "nan"),
        ("solver: {lr: .inf}", "solver.lr", "inf"),
        ("solver: {epochs: 1.5}", "solver.epochs", "1.5"),
        ("solver: {epochs: 0}", "solver.epochs", "0"),
        ("solver: {optimizer: adam}", "solver.optimizer", "adam"),
        ("solver: {decay_at: [0.9, 0.5]}", "solver", "[0.9, 0.5]"),
        ("solver: {decay_at: [2]}", "solver", "[2.0]"),
        ("solver: {batch_size: 5, accumulate: 2}", "solver", "batch_size 5"),
        ("solver: {ema: 1}", "solver.ema", "1"),
        ("data: {short_side: 800, long_side: 600}", "data", "long_side 600"),
        ("data: {scale_jitter: [2, 1]}", "data", "scale_jitter"),
        ("data: {scale_jitter: 2}", "data.scale_jitter", "2"),
        ("model: {norm: layer}", "model.norm", "layer"),
        ("model: {fpn_channels: 100}", "model.fpn_channels", "100"),
        ("model: {frozen_stages: 5}", "model.frozen_stages", "5"),
        ("model: {backbone: vgg}", "model.backbone", "vgg"),
        ("model: {weights: none}", "model", "norm frozen_bn with weights none"),
        ("model: {weights: none, norm: bn, frozen_stages: 1}", "model", "frozen_stages 1 with weights none"),
        ("model: {norm: gn}", "model", "norm gn with weights imagenet"),
        ("postprocess: {nms_iou: 2}", "postprocess.nms_iou", "2"),
        ("box_coder: {weights: [1, 1]}", "box_coder.weights", "Field required"),
        ("class_loss: {name: focal, weight: 0}", "class_loss.weight", "0"),
        ("class_loss: {gamma: 1}", "class_loss.name", "required"),
        ("solver: {epochs: true}", "solver.epochs", "True"),
        ("solver: {ema: yes}", "solver.ema", "True"),
        ("class_loss: {name: ghm_c, bins: on}", "class_loss.bins", "True"),
        ("precision: half", "precision", "half"),
        ("seed: -1", "seed", "-1"),
        ("data: {short_side: 1000000, long_side: 1000000}", "data.short_side", "1000000"),
        ("anchors: {name: grid, octaves: 1000000000}", "anchors", "octaves exceeds 1,000,000"),
        ("anchors: {name: grid, sizes: [1, 1, 1, 1, '1e300']}", "anchors", "sizes exceeds"),
        ("class_loss: {name: ghm_c, bins: " + "9" * 400 + "}", "class_loss", "bins exceeds"),
        ("data: {workers: 100000}", "data.workers: give auto, or a whole number from 0 to 1024", "100000"),
        ("data: {workers: many}", "data.workers: give auto, or a whole number from 0 to 1024", "many"),
        ("solver: {epochs: 9223372036854775808}", "solver.epochs", "exceeds 64 bits"),
        ('run: "a\\nb"', "run", r"holds control characters (found 'a\nb')"),
        ('data: {val: {images: "\\u2028"}}', "data.val.images", "holds control characters"),
        ("seed: 100000000000000000000", "seed", "100000000000000000000"),
        ("run: ''", "run", "''"),
    ],
)
def test_a_wrong_value_is_reported_with_its_key(error_of, tmp_path, text, key, found):
    message = error_of(text)
    assert message.startswith(f"{tmp_path / 'x.yaml'}: {key}")
    assert found in message


def test_the_number_of_other_mistakes_is_reported(error_of):
    assert error_of("solver: {lr: 0, epochs: 0, ema: 2}").endswith("(and 2 more)")


# Whatever the shape of the text, the error is one line without a traceback.
@pytest.mark.parametrize(
    "text",
    [
        "data: 3",
        "solver: []",
        "class_loss: focal",
        "class_loss: []",
        "class_loss: {name: [focal]}",
        "class_loss: {name: null}",
        "class_loss: {name: {focal: 1}}",
        "solver:",
        "data: {train: null}",
        "model: {head: [1, 2]}",
        "data: {train: {annotations: {a: {b: {c: [1, {d: e}]}}}}}",
        "3: 4",
        "null: 4",
        "class_loss: {name: focal, 3: 4}",
        "? [a, b]\n: c",
        "- a\n- b",
        "just text",
        "3",
        "seed: 2024-01-01",
        "seed: 2024-13-45",
        "run: [",
        "run: a: b",
        "\tx: 1",
        "run: \x00",
        "run: !!python/object:os.system x",
        "[" * 3000,
        "&a [*a]",
        "data: &a {train: *a}",
        "class_loss: {name: focal, gamma: {a: &x [*x]}}",
        '"a\\nb": 3',
        "seed: " + "9" * 5000,
        "seed: 0x" + "f" * 5000,
        "seed: !!bool x",
        "seed: !!int ''",
        "seed: !!timestamp x",
        "solver: {lr: " + "1:" * 300 + "1.5}",
        "seed: 0001-01-01 00:00:00 +23:59",
        '"\\e[2J\\r\\u2028": 3',
        '{"' + "a" * 100_000 + '": 3}',
        "class_loss: {name: focal, gamma: " + "[" * 50 + "]" * 50 + "}",
    ],
)
def test_odd_shapes_are_refused_in_one_line(error_of, text):
    assert "x.yaml" in error_of(text)


@pytest.mark.parametrize(
    "setting", ["data=3", "run=", "solver=[]", "solver.lr", "=3", "solver..lr=1", ".lr=1", "seed=2024-13-45", "seed=[",
                "a\nb=3", "a\nb", "\ud800=3", "run=\ud800", "a." * 5000 + "a=1", "solver.lr.x=1", "class_loss=focal",
                "class_loss.name=", "base=other.yaml", "solver.lr=nan"]
)  # fmt: skip
def test_odd_settings_are_refused_in_one_line(error_of, setting):
    error_of("", setting)


def test_files_that_are_no_config_are_refused(tmp_path):
    for path, content in ((tmp_path / "missing.yaml", None), (tmp_path / "bytes.yaml", b"\xff\xfe\x00")):
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=path.name) as error:
            config_files.read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        config_files.read(tmp_path)


def test_a_key_given_twice_is_refused(error_of, tmp_path):
    x = tmp_path / "x.yaml"
    assert (
        error_of("seed: 1\nsolver: {lr: 1}\nsolver: {ema: 0.9}") == f"{x}: line 3: not YAML ('solver' is given twice)"
    )
    assert error_of("solver: {lr: 1, ema: 0.9, lr: 2}") == f"{x}: line 1: not YAML ('lr' is given twice)"


def test_aliases_and_merge_keys_may_be_used(tmp_path):
    cfg = load(tmp_path, "data:\n  train: &files {images: a, annotations: b}\n  val: {<<: *files, annotations: c}")
    assert (cfg.data.val.images, cfg.data.val.annotations, cfg.data.train.annotations) == ("a", "c", "b")


@pytest.mark.parametrize("text", ['base: "a\\nb"', "base: 3", 'base: "\\0"', "base: ''", "base: [a]", "base: ."])
def test_odd_bases_are_refused_in_one_line(error_of, text):
    error_of(text)


def test_broken_yaml_names_the_line(error_of, tmp_path):
    assert error_of("run: x\nsolver: {lr: 1\n").startswith(f"{tmp_path / 'x.yaml'}: line 3: not YAML")


def test_the_path_of_a_base_is_relative_to_the_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.yaml").write_text("seed: 1\nsolver: {lr: 0.5, epochs: 3}")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nrun: b\nsolver: {lr: 0.25}")
    (tmp_path / "deep" / "c.yaml").write_text("base: ../b.yaml\nseed: 2")
    cfg = configure(tmp_path / "deep" / "c.yaml")
    assert (cfg.seed, cfg.run, cfg.solver.lr, cfg.solver.epochs) == (2, "b", 0.25, 3)


def test_circular_and_missing_bases_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    (tmp_path / "self.yaml").write_text("base: self.yaml")
    (tmp_path / "orphan.yaml").write_text("base: gone.yaml")
    for name, text in (("a", "lead back to itself"), ("self", "lead back to itself"), ("orphan", "gone.yaml: no such")):
        with pytest.raises(UserError, match=text):
            config_files.read(tmp_path / f"{name}.yaml")


def test_1e_2_is_a_number_although_pyyaml_reads_text(tmp_path):
    assert yaml.safe_load("1e-2") == "1e-2"
    text = "solver: {lr: 1e-2, clip_norm: 1e1}\nbox_loss: {name: smooth_l1, beta: 1e-1, weight: 2e0}"
    cfg = load(tmp_path, text, "solver.weight_decay=1e-3", "class_loss.name=focal", "class_loss.gamma=5e-1")
    assert (cfg.solver.lr, cfg.solver.clip_norm, cfg.solver.weight_decay) == (0.01, 10, 0.001)
    assert cfg.box_loss.options == {"beta": 0.1} and cfg.box_loss.weight == 2
    assert cfg.class_loss.options["gamma"] == 0.5


def test_settings_apply_in_order_on_top_of_the_file(tmp_path):
    cfg = load(tmp_path, "solver: {lr: 1, epochs: 3}", "solver.lr=2", "solver.lr=3", "data.train.images=a=b", "run=x")
    assert (cfg.solver.lr, cfg.solver.epochs, cfg.data.train.images, cfg.run) == (3, 3, "a=b", "x")
    assert load(tmp_path, "", "solver={lr: 3}").solver.lr == 3


def test_the_order_of_settings_decides_only_between_those_of_one_option(tmp_path):
    settings = ["class_loss.weight=2", "class_loss.name=ghm_c", "class_loss.bins=10"]
    parts = [load(tmp_path, "", *order).class_loss for order in itertools.permutations(settings)]
    assert all(part == parts[0] for part in parts)
    assert (parts[0].name, parts[0].weight, parts[0].options["bins"]) == ("ghm_c", 2, 10)


@pytest.mark.parametrize("digits", ["7", "007", "008", "010", "1_0", "+10"])
def test_whole_numbers_are_decimal(tmp_path, digits):
    assert load(tmp_path, f"seed: {digits}").seed == load(tmp_path, "", f"seed={digits}").seed == int(digits)


def test_an_hour_and_minutes_are_no_number(error_of, tmp_path):
    assert "seed" in error_of("seed: 1:30")


def test_a_part_with_another_name_drops_its_old_options(tmp_path):
    (tmp_path / "base.yaml").write_text("class_loss: {name: focal, alpha: 0.9, weight: 3}")
    other_loss = load(tmp_path, "base: base.yaml\nclass_loss: {name: ghm_c}").class_loss
    assert other_loss.weight == 1 and "alpha" not in other_loss.options
    same_loss = load(tmp_path, "base: base.yaml\nclass_loss: {name: focal, gamma: 1}").class_loss
    assert same_loss.options == {"alpha": 0.9, "gamma": 1} and same_loss.weight == 3
    unnamed_loss = load(tmp_path, "base: base.yaml\nclass_loss: {gamma: 1}").class_loss
    assert unnamed_loss == same_loss
    assert load(tmp_path, "base: base.yaml", "class_loss.name=ce").class_loss.options == {"alpha": None}


def test_options_without_a_name_belong_to_the_part_that_is_the_default(tmp_path):
    cfg = load(tmp_path, "assigner: {fg_iou: 0.6}\nanchors: {octaves: 2}", "assigner.name=iou", "anchors.name=grid")
    assert (cfg.assigner.options["fg_iou"], cfg.anchors.options["octaves"]) == (0.6, 2)


def test_merge_leaves_its_arguments_unchanged():
    values, changes = {"a": {"b": 1}, "c": {"name": "x", "d": 1}}, {"a": {"e": 2}, "c": {"name": "y"}}
    assert merge(values, changes) == {"a": {"b": 1, "e": 2}, "c": {"name": "y"}}
    assert values == {"a": {"b": 1}, "c": {"name": "x", "d": 1}} and changes == {"a": {"e": 2}, "c": {"name": "y"}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model: {weights: none, norm: bn}\nsolver: {lr: 1e-5, ema: 0.998, max_steps: 7, lr_batch_size: null}",
        "class_loss: {name: ghm_c, momentum: 0}\nbox_loss: {name: ghm_r}\nassigner: {name: iou, bg_iou: 0.3}",
        "run: 'no: yes'\ndata: {train: {annotations: 'ü # x', images: '{a}'}}\nanchors: {name: torchvision}",
    ],
)
def test_a_dumped_config_loads_to_the_same(tmp_path, text):
    cfg = load(tmp_path, text)
    assert load(tmp_path, config.dump(cfg)) == cfg
    assert config.dump(load(tmp_path, config.dump(cfg))) == config.dump(cfg)


def test_nested_options_flatten_to_dotted_keys():
    assert config.flat({"a": {"b": {"c": 1, "d": None}}, "e": [1, 2]}) == {"a.b.c": 1, "a.b.d": None, "e": [1, 2]}


def test_box_weights_must_be_positive(error_of):
    assert "box_coder.weights.0: Input should be greater than 0" in error_of("box_coder: {weights: [0, 1, 1, 1]}")


TEXTS = [
    "1",
    "007",
    "2024-05-01",
    "2024-13-45",
    "1e3",
    "0x1f",
    "1_000",
    "12:30",
    "true",
    "No",
    ".nan",
    "=",
    "<<",
    "x y",
]
# Only the command line takes these as typed: in a file they are other YAML, or no YAML.
TYPED = [
    "null",
    "~x",
    "a #2",
    "a: b",
    "{a}",
    "[",
    "'q'",
    '"q"',
    " x ",
    "a=b",
    "a\\b",
    "*x",
    "&x",
    "!x",
    "%",
    "@",
    "# x",
    "-",
]


@pytest.mark.parametrize("text", TEXTS + TYPED)
def test_text_is_taken_as_it_is_typed(tmp_path, text):
    cfg = load(tmp_path, "", f"run={text}", f"data.train.images=/{text}", f"data.cache=x/{text}")
    assert (cfg.run, cfg.data.train.images, cfg.data.cache) == (text, f"/{text}", f"x/{text}")
    assert load(tmp_path, config.dump(cfg)) == cfg


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_written(tmp_path, text):
    (tmp_path / "base.yaml").write_text(f"run: {text}\ndata: {{train: {{images: {text}}}}}")
    cfg = load(tmp_path, "base: base.yaml", f"data={{val: {{images: {text}}}}}")
    assert (cfg.run, cfg.data.train.images, cfg.data.val.images) == (text, text, text)


def test_values_of_options_that_are_not_text_are_parsed(tmp_path):
    cfg = load(
        tmp_path, "run: '1'\nseed: 0x1f", "solver.epochs=1_0", "channels_last=no", "solver.ema=null", "data.cache="
    )
    assert (cfg.run, cfg.seed, cfg.solver.epochs, cfg.channels_last, cfg.solver.ema) == ("1", 31, 10, False, None)
    assert cfg.data.cache == ""


def test_configs_of_older_versions_may_have_the_option_compile(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, "run: a\ncompile: false") == load(tmp_path, "run: a")
    with pytest.warns(UserWarning, match="^compile: "):
        assert load(tmp_path, "run: a\ncompile: true") == load(tmp_path, "run: a")


@pytest.mark.parametrize("text", ["run:", "run: null", "run: ~", "data: {cache: null}", "run: [1]", "run: {a: 1}"])
def test_null_and_containers_are_no_text_in_a_file(error_of, text):
    assert "valid string" in error_of(text)


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {train: {annotations: ~/a.json}, cache: ~/c}\nrun: ~/r")
    cfg = load(tmp_path, "base: ~/mine.yaml", "data.val.images=~/b", "model.weights=~/w.pt", "output=~", "device=~")
    assert (cfg.data.train.annotations, cfg.data.cache) == (f"{tmp_path}/a.json", f"{tmp_path}/c")
    assert (cfg.data.val.images, cfg.model.weights, cfg.output) == (f"{tmp_path}/b", f"{tmp_path}/w.pt", str(tmp_path))
    assert (cfg.run, cfg.device) == ("~/r", "~")  # these options are no paths


@pytest.mark.parametrize(
    ("text", "settings", "source"),
    [
        ("", ["solver.lr=fast"], "--set solver.lr=fast: solver.lr: "),
        ("solver: {lr: 1}", ["seed=1", "solver={lr: fast}"], "--set solver={lr: fast}: solver.lr: "),
        ("", ["solver.lrr=1"], "--set solver.lrr=1: solver.lrr: unknown option"),
        ("class_loss: {name: ce}", ["class_loss.gama=1"], "--set class_loss.gama=1: class_loss.gama: unknown option"),
        ("", ["class_loss.gamma=1"], "--set class_loss.gamma=1: class_loss.name: Field required"),
        ("", ["model.backbone=vgg", "seed=1"], "--set model.backbone=vgg: model.backbone: no 'vgg'"),
        ("", ["base=other.yaml"], "--set base=other.yaml: base: unknown option"),
        ("", ["run="], "--set run=: run: "),
        ("", ["data=3"], "--set data=3: data: "),
        # Each is right alone, both together are wrong.
        ("solver: {batch_size: 5}", ["solver.accumulate=2"], "--set solver.accumulate=2: solver: batch_size 5 cannot"),
        ("", ["seed=1", "model.norm=bn", "solver.skip_nonfinite=1"],
         "--set model.norm=bn solver.skip_nonfinite=1: solver.skip_nonfinite with model.norm bn: "),
        ("", ["data.trust=true", "data.long_side=300", "data.cache=y"], "--set data.long_side=300: data: long_side"),
        ("", ["data.cache=y", "data.long_side=300", "data.short_side=400"],
         "--set data.long_side=300 data.short_side=400: data: long_side 300"),
        ("", ["seed=x", "seed=x", "run=y"], "--set seed=x: seed: "),
        ("model: {norm: bn}", ["solver.skip_nonfinite=1"], "--set solver.skip_nonfinite=1: solver.skip_nonfinite with"),
        ("assigner: {name: iou, fg_iou: 0.4}", ["assigner.bg_iou=0.5"], "--set assigner.bg_iou=0.5: assigner: "),
        # These mistakes are in the file.
        ("solver: {lr: fast}", ["seed=1", "run=x"], "{file}: solver.lr: "),
        ("seed: x", ["solver.lr=fast"], "{file}: seed: "),
        ("data: {short_side: 800, long_side: 600}", ["data.workers=0"], "{file}: data: long_side 600"),
        ("model: {norm: bn}\nsolver: {skip_nonfinite: 1}", ["solver.lr=1"], "{file}: solver.skip_nonfinite with"),
        ("class_loss: {name: focal, gama: 1}", ["class_loss.alpha=0.5"], "{file}: class_loss.gama: "),
    ],
)  # fmt: skip
def test_an_error_names_the_settings_that_cause_it(error_of, tmp_path, text, settings, source):
    assert error_of(text, *settings).startswith(source.replace("{file}", str(tmp_path / "x.yaml")))
