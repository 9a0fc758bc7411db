"""Configs: what is refused, with which words, and that what is accepted survives JSON and overrides unchanged."""

import json
import math
import textwrap
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from diffjax.train import checks
from diffjax.train import config as configs
from diffjax.train.errors import ConfigError
from diffjax.train.parts import assemble, resolve

ROOT = Path(__file__).parents[2]


def tiny(**changes):
    return ConfigDict(dict(batch_size=8, num_steps=10, model=dict(name="mlp", width=16, depth=1)) | changes)


FLOW = dict(schedule="flow()", head="flow()", sample=dict(spacing="uniform()"))
TABLE = dict(schedule="ddpm()", head="eps()", sample=dict(spacing="leading()"))
UNLABELLED = f"diffjax.data:arrays(images={((((0.0,),),),) * 16})"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_step=3), ["config.num_step;", "num_steps", "did you mean 'num_steps'"]),
        (dict(lrr=1.0), ["config.lrr;", "did you mean 'optim.lr'"]),
        (dict(schedul="edm()"), ["config.schedul;", "did you mean 'schedule'"]),
        (dict(optim=dict(lrr=1.0)), ["config.optim.lrr", "known keys of config.optim", "did you mean 'lr'"]),
        (dict(sample=dict(solvr="x")), ["config.sample.solvr", "did you mean 'solver'"]),
        (dict(num_steps=-5), ["config.num_steps is -5", "at least 1", "--config.num_steps=VALUE"]),
        (dict(batch_size=0), ["config.batch_size is 0", "at least 1"]),
        (dict(batch_size=10**6), ["config.batch_size is 1000000", "at most the 899 training items"]),
        (dict(label_dropout=1.5), ["config.label_dropout is 1.5", "in [0, 1]"]),
        (dict(label_dropout=math.nan), ["config.label_dropout is nan", "in [0, 1]"]),
        (dict(num_steps="many"), ["config.num_steps is 'many' (str)", "must be an int"]),
        (dict(num_steps=1.5), ["config.num_steps is 1.5", "must be an int"]),
        (dict(tensorboard=1), ["config.tensorboard is 1 (int)", "must be a bool"]),
        (dict(optim="adam"), ["config.optim is 'adam'", "group of keys", "lr"]),
        (dict(schedule="edn()"), ["config.schedule", "unknown schedule 'edn'", "cosine", "did you mean 'edm'"]),
        (dict(head="velocty"), ["config.head", "unknown head 'velocty'", "flow"]),
        (dict(time="lognormall()"), ["config.time", "did you mean 'lognormal'"]),
        (dict(weight="min_snrr()"), ["config.weight", "did you mean 'min_snr'"]),
        (dict(model=dict(name="unt")), ["config.model", "unknown model 'unt'", "did you mean 'unet'"]),
        (dict(model=dict(name="mlp", widht=3)), ["config.model", "widht", "did you mean 'width'"]),
        (dict(model=dict(width=3)), ["config.model", "needs a name"]),
        (dict(model=dict(name="dit", patch=3, width=16, depth=1, heads=2)), ["config.model", "patch", "3", "8"]),
        (dict(sample=dict(solver="dpmpp2m()")), ["config.sample.solver", "did you mean 'dpmpp_2m'"]),
        (dict(sample=dict(spacing="karas()")), ["config.sample.spacing", "did you mean 'karras'"]),
        (dict(sample=dict(spacing="karras(rhoo=3)")), ["config.sample.spacing", "rhoo", "rho"]),
        (dict(sample=dict(interval=(3.0, 1.0))), ["config.sample.interval", "0 <= low"]),
        (dict(optim=dict(name="adan")), ["config.optim", "did you mean 'adam'"]),
        (dict(optim=dict(lr=-1.0)), ["config.optim", "lr", "-1.0"]),
        (dict(sharding="fdsp"), ["config.sharding is 'fdsp'", "'data', 'fsdp', 'rules' or 'pmap'"]),
        (dict(mesh="data:2"), ["config.mesh is 'data:2'", "data=2,fsdp=2,tensor=2"]),
        (dict(mesh="tensr=1"), ["config.mesh is 'tensr=1'", "unknown mesh axis 'tensr'", "did you mean 'tensor'"]),
        (dict(batch_size=12, microbatch=5), ["config.microbatch is 5", "divide the 12 rows"]),
        (dict(accumulate_loop="scn"), ["config.accumulate_loop is 'scn'", "'auto', 'scan' or 'unroll'"]),
        (dict(mesh="data=3,fsdp=5"), ["config.mesh is 'data=3,fsdp=5'", "do not fit 1 devices", "multiply to 1"]),
        # Before the data are opened, which are not there.
        (dict(mesh="data=8", data="gone:fn"), ["do not fit 1 devices", "`diffjax inspect --mesh=...` plans a run"]),
        (dict(sharding="rules"), ["config.mesh is ''", "name none of the axes data", "'data=2,fsdp=2,tensor=2'"]),
        (dict(sample=dict(interval=(1.0, 1.0))), ["config.sample.interval", "low < high"]),
        (dict(guard=dict(on_bad="ignore")), ["config.guard.on_bad is 'ignore'", "'stop', 'skip' or 'rollback'"]),
        (dict(guard=dict(spike=0.5)), ["config.guard.spike is 0.5", "a factor above 1"]),
        (dict(guard=dict(patience=-1)), ["config.guard.patience is -1", "at least 0"]),
        (dict(on_save_error="ignore"), ["config.on_save_error is 'ignore'", "'stop' or 'continue'"]),
        (dict(keep=1), ["config.keep is 1", "at least 2"]),
        (dict(profile=(5, 3)), ["config.profile is (5, 3)", "(first, last)"]),
        (dict(ema_snapshots=-1), ["config.ema_snapshots is -1", "0 for none"]),
        (dict(input=dict(prefetch=0)), ["config.input.prefetch is 0", "at least 1"]),
        (dict(eval=dict(num_samples=5)), ["config.eval.num_samples is 5", "at least 6"]),
        (dict(label_dropout=0, sample=dict(guidance=2.0)), ["config.sample.guidance is 2.0", "config.label_dropout"]),
        (dict(data=UNLABELLED, sample=dict(guidance=2.0)), ["config.sample.guidance is 2.0", "without classes"]),
        (FLOW | dict(time="lognormal()"), ["config.time is 'lognormal()'", "config.schedule is 'flow()'", "uniform()"]),
        (FLOW | dict(time="discrete()"), ["config.time is 'discrete()'", "[0, 1]", "logit_normal()"]),
        (TABLE | dict(time="uniform()"), ["times end at 1 and the schedule at 999", "discrete(num_steps=1000)"]),
        (TABLE | dict(time="discrete(num_steps=500)"), ["times end at 499", "discrete(num_steps=1000)"]),
        (TABLE | dict(time="discrete(num_steps=2000)"), ["% of the times lie within", "discrete(num_steps=1000)"]),
        (dict(time="discrete()"), ["config.schedule is 'edm()'", "lognormal("]),
        (dict(ema=("decay(0.9)", "decay(0.9)")), ["config.ema", "twice"]),
        (dict(ema=("pwr(std=0.1)",)), ["config.ema", "unknown ema 'pwr'"]),
        (dict(data="digit()"), ["config.data", "did you mean 'digits'"]),
        (dict(data="folder('gone', size=8)"), ["config.data: no folder 'gone'", "--config.data=VALUE"]),
        (dict(augment=("shft()",)), ["config.augment", "did you mean 'shift'"]),
        (
            dict(schedule="flow()", time="uniform()", head="eps", sample=dict(spacing="uniform()")),
            ["config.sample", "eps head is undefined at alpha = 0"],
        ),
    ],
)
def test_refused_with_the_key_the_value_and_the_way_out(changes, words):
    with pytest.raises(ConfigError) as caught:
        resolve(tiny(**changes))
    for word in words:
        assert word in str(caught.value)


def test_defaults_fill_what_is_not_given_and_types_are_lossless():
    config = configs.fill(tiny(label_dropout=0, ema="decay(0.9)", sample=dict(interval=[0, 3]), num_steps=1e3))
    assert config.label_dropout == 0.0 and isinstance(config.label_dropout, float)
    assert config.ema == ("decay(0.9)",)
    assert config.sample.interval == (0.0, 3.0)
    assert config.num_steps == 1000 and isinstance(config.num_steps, int)
    assert config.sample.steps == configs.defaults().sample.steps


def test_json_is_strict_and_brings_the_config_back():
    config = configs.fill(tiny(augment=("flip()",), optim=dict(decay_rules=(("kernel", 1.0), (".*", 0.0)))))
    refuse = lambda constant: pytest.fail(f"{constant} is not strict JSON")
    back = configs.fill(ConfigDict(json.loads(configs.to_json(config), parse_constant=refuse)))
    assert back == config
    assert back.sample.interval == (0.0, math.inf)
    assert configs.differences(config, back) == []


def test_differences_name_the_leaf_and_leave_out_what_a_resumed_run_may_change():
    stored = configs.fill(tiny())
    given = configs.fill(tiny(num_steps=99, log_every=3, sample=dict(steps=7), optim=dict(lr=0.5)))
    assert configs.differences(stored, given) == ["optim.lr: 0.001 -> 0.5"]


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "7", 7),
        ("optim.lr", "1e-3", 1e-3),
        ("sample.interval", "0.1,inf", (0.1, math.inf)),
        ("sample.interval", "(0.1, 3)", (0.1, 3.0)),
        ("ema", "power(std=0.1),decay(0.9, warmup=False)", ("power(std=0.1)", "decay(0.9, warmup=False)")),
        ("ema", "('decay(0.5)',)", ("decay(0.5)",)),
        ("head", "edm(sigma_data=1.0)", "edm(sigma_data=1.0)"),
        ("model.width", "32", 32),
        ("tensorboard", "true", True),
        ("stop_at", "5", 5),
    ],
)
def test_override_reads_the_text_in_the_type_of_the_key(key, text, value):
    config = tiny()
    configs.override(config, key, text)
    found = configs.fill(config)
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_a_misspelt_override_is_refused_by_name():
    config = tiny()
    configs.override(config, "optim.lrr", "1")
    with pytest.raises(ConfigError, match=r"config\.optim\.lrr.*did you mean 'lr'"):
        configs.fill(config)
    with pytest.raises(ConfigError, match="no keys below it"):
        configs.override(tiny(), "batch_size.x", "1")


def test_a_config_names_the_users_own_code(tmp_path, monkeypatch):
    (tmp_path / "mine_config.py").write_text(
        textwrap.dedent("""
        import jax.numpy as jnp
        from diffjax.core import Flow, Model
        from diffjax.sampling import euler

        def schedule(shift=1.0):
            return Flow(shift=shift)

        def weight(power):
            return lambda level: level.alpha**power

        def net(*, shape, num_classes, gain=1.0):
            return Model(lambda key: {"b": jnp.zeros(shape)}, lambda p, x, t, y, key=None: gain * x + p["b"], {})

        def too_small(*, shape, num_classes):
            return Model(lambda key: {}, lambda p, x, t, y, key=None: x[:, :4], {})
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = dict(
        schedule="mine_config:schedule(shift=3.0)",
        time="uniform()",
        head="flow",
        weight="mine_config:weight(2)",
        model=dict(name="mine_config:net", gain=0.5),
        sample=dict(solver="mine_config:euler()", spacing="uniform()"),
    )
    parts = assemble(configs.fill(tiny(**mine)))
    assert parts.schedule.shift == 3.0
    assert parts.weight(parts.schedule(0.0)) == 1.0
    with pytest.raises(ConfigError, match=r"config\.schedule: cannot import schedule 'mine_config:gone'"):
        resolve(tiny(**mine | dict(schedule="mine_config:gone()")))
    with pytest.raises(ConfigError, match=r"config\.model: .*\(8, 8, 8, 1\) to \(8, 4, 8, 1\)"):
        resolve(tiny(**mine | dict(model="mine_config:too_small")))


@pytest.mark.parametrize(
    "schedule, time",
    [
        ("edm()", "lognormal(mean=1.0, std=1.6)"),
        ("flow(shift=3.0)", "stratified()"),
        ("flow()", "logit_normal()"),
        ("vp()", "uniform()"),
        ("cosine()", "antithetic()"),
        ("sub_vp()", "uniform(lo=0.001)"),
        ("ve()", "uniform()"),
        ("linear_logsnr()", "uniform()"),
        ("ddpm(num_steps=10)", "discrete(num_steps=10)"),
        ("squared_cosine(num_steps=50, rescale=True)", "uniform(hi=49.0)"),
    ],
)
def test_times_that_fit_their_schedule_pass(schedule, time):
    from diffjax import core, registry

    build = lambda spec, known: registry.build(spec, known, "part")
    config = ConfigDict(dict(schedule=schedule, time=time))
    checks.check_times(config, build(schedule, core.SCHEDULES), build(time, core.TIMES))


@pytest.mark.parametrize("name", ["digits", "digits_unet", "digits_dit", "digits_mlp"])
def test_the_shipped_configs_run(name):
    smoke = resolve(configs.load(f"{ROOT}/configs/{name}.py:smoke,seed=3"))
    assert smoke.seed == 3 and smoke.num_steps < 100
    resolve(configs.load(f"{ROOT}/configs/{name}.py"))


def test_load_says_what_is_wrong_with_the_file(tmp_path):
    with pytest.raises(ConfigError, match="no file .*gone.py"):
        configs.load(f"{tmp_path}/gone.py:smoke")
    with pytest.raises(ConfigError, match="unknown config argument 'smok'.*did you mean 'smoke'"):
        configs.load(f"{ROOT}/configs/digits.py:smok")
    (tmp_path / "broken.py").write_text("def get_config():\n    return undefined_name\n")
    with pytest.raises(ConfigError, match="NameError.*undefined_name"):
        configs.load(f"{tmp_path}/broken.py")
    (tmp_path / "nothing.py").write_text("def get_config():\n    config = {}\n")
    with pytest.raises(ConfigError, match="get_config gives NoneType None"):
        configs.load(f"{tmp_path}/nothing.py")
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'optim': {'lr': 0.5}}\n")
    assert configs.fill(configs.load(f"{tmp_path}/plain.py")).optim.lr == 0.5
    for text in ("[1, 2]", "{'seed': 4"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="expected a JSON object"):
            configs.load(f"{tmp_path}/config.json")
    (tmp_path / "config.json").write_text('{"seed": 4}')
    assert configs.load(f"{tmp_path}/config.json").seed == 4
