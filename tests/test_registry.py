"""Names in configs: parsing, messages, and that nothing is evaluated."""

import pytest

from diffjax import registry

KNOWN = {"karras": lambda rho=7.0, s_max=80.0: (rho, s_max), "uniform": lambda: "uniform"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("uniform", ("uniform", (), {})),
        ("karras()", ("karras", (), {})),
        ("karras(5, s_max=40.)", ("karras", (5,), {"s_max": 40.0})),
        (
            "my_pkg.module:fn(a='x', b=(1, 2), c=None, d=-1)",
            ("my_pkg.module:fn", (), dict(a="x", b=(1, 2), c=None, d=-1)),
        ),
    ],
)
def test_parse(spec, expected):
    assert registry.parse(spec) == expected


@pytest.mark.parametrize("spec", ["", "karras(", "karras)(", "ka rras", "a:b:c", "karras(**{})", "f(x)(y)", "1abc"])
def test_malformed(spec):
    with pytest.raises(ValueError, match="expected 'name'"):
        registry.parse(spec)


@pytest.mark.parametrize(
    "spec", ["karras(rho=__import__('os').getpid())", "karras(rho=rho)", "karras([1 for _ in 'a'])"]
)
def test_arguments_are_literals_never_code(spec):
    with pytest.raises(ValueError, match="must be literals"):
        registry.parse(spec)


def test_build():
    assert registry.build("karras(rho=5.)", KNOWN, "spacing") == (5.0, 80.0)
    assert registry.build({"name": "karras", "s_max": 1.0}, KNOWN, "spacing") == (7.0, 1.0)
    assert registry.build("operator:sub(3, 4)", KNOWN, "spacing") == -1
    # What the caller offers goes to parameters of that name only, and what the text says comes first.
    assert registry.build("karras(rho=5.)", KNOWN, "spacing", rho=6.0, other=1) == (5.0, 80.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("karas", "unknown spacing 'karas'; known: karras, uniform.*did you mean 'karras'"),
        ("karras(roh=3)", "spacing 'karras'.*roh.*arguments: rho, s_max; did you mean 'rho'"),
        ("no_such_pkg:fn", "cannot import spacing 'no_such_pkg:fn'"),
        ("math:no_such_fn", "cannot import spacing"),
    ],
)
def test_messages(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.build(spec, KNOWN, "spacing")
