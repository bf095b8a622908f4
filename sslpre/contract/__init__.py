"""What every method must keep, as tests that any package can import for its methods.

In a test file of that package:

    import pytest

    pytest.register_assert_rewrite("sslpre.contract")
    from sslpre.contract import *

    @pytest.fixture(params=["my-method"])
    def method(request):
        return request.param

Without a fixture `method` of its own the tests run over all methods that are installed. A method needs a recipe whose
name begins with the method's. Each test runs on a part of the built-in sample set, with a tiny encoder at 32 px.
"""

from sslpre.contract import processes, single
from sslpre.contract.pair import pair
from sslpre.contract.processes import *  # noqa: F403
from sslpre.contract.single import *  # noqa: F403
from sslpre.contract.single import method

# Computed, so that a test written in one of these rooms is a test everywhere.
tests = [name for room in (single, processes) for name in vars(room) if name.startswith("test_")]
__all__ = ["method", "pair", *tests]
