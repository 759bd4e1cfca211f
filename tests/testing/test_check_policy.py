"""The suites for authors say what they are for."""

import pytest

from waveos.errors import PolicyError
from waveos.testing import check_policy, record_stream


@pytest.mark.parametrize(("policy", "subsystem"), [("rss", "net"), ("region_age", "memory"), ("fcfs_lru", "serving")])
def test_a_policy_of_another_subsystem_is_refused(policy, subsystem):
    with pytest.raises(PolicyError, match=f"^check_policy is for policies of sched; '{policy}' is one of {subsystem}$"):
        check_policy(policy)
    with pytest.raises(PolicyError, match=f"^record_stream is for policies of sched; '{policy}' is one of {subsystem}$"):
        record_stream(policy)
