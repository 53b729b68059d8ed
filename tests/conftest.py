"""The hypothesis profiles: `pytest --hypothesis-profile=recorded tests/test_properties.py` runs the
cases that docs/trust.md counts."""

from hypothesis import HealthCheck, Phase, settings

# Examples take milliseconds on an idle machine; a loaded one must not fail a test.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=80, derandomize=True, **_COMMON)
settings.register_profile("recorded", max_examples=3000, print_blob=True, **_COMMON)
# On a card, where each call waits for the device.
_RECORDED = settings.get_profile("recorded")
settings.register_profile("recorded-gpu", _RECORDED, max_examples=1000)
# make mutants wants to know that a case fails, not the smallest one.
_NO_SHRINKING = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
settings.register_profile("mutants", settings.get_profile("ci"), phases=_NO_SHRINKING)
# On a card each call waits for the device: there shrinking one failure takes minutes.
settings.register_profile("gpu", settings.get_profile("mutants"))
settings.load_profile("ci")


def pytest_configure(config):
    if config.getoption("markexpr") == "gpu" and not config.getoption("--hypothesis-profile"):
        settings.load_profile("gpu")
