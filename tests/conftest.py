"""The hypothesis profiles: `pytest --hypothesis-profile=recorded tests/test_properties.py` runs the
cases that docs/trust.md counts."""

from hypothesis import HealthCheck, Phase, settings

# Examples take milliseconds on an idle machine; a loaded one must not fail a test.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=80, derandomize=True, **_COMMON)
settings.register_profile("recorded", max_examples=3000, print_blob=True, **_COMMON)
# make mutants wants to know that a case fails, not the smallest one.
_NO_SHRINKING = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
settings.register_profile("mutants", settings.get_profile("ci"), phases=_NO_SHRINKING)
settings.load_profile("ci")
