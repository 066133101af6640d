"""Settings for all tests: how Hypothesis draws its examples."""

import os

from hypothesis import HealthCheck, settings

# No deadline: two busy cores make any example slow once. `make test` draws the same examples each
# time, so that a change is never blamed for an example that another one would have met as well;
# `make test-all` and a bare `pytest` look for new ones.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile(
    "long",
    deadline=None,
    max_examples=1_000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
