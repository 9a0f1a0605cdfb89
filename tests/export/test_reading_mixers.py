"""As test_reading.py, for exports of the mixers that are not there."""

import pytest

from tests.export import test_reading as reading
from tests.export.students import OTHER_MIXERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exports(tmp_path_factory, teacher_folder):
    return reading.export_all(OTHER_MIXERS, teacher_folder, tmp_path_factory.mktemp("mixers") / "exports")


@pytest.fixture(scope="module", params=reading.READERS)
def read_back(request, exports):
    return reading.read_all(OTHER_MIXERS, exports, request.param)


@pytest.mark.parametrize("case", OTHER_MIXERS)
def test_logits_loading_and_generation(read_back, exports, case, record_property):
    reading.test_logits_equal_ours(read_back, exports, case, record_property)
    reading.test_loads_whole_and_only_with_trust(read_back, case)
    reading.test_generation(read_back, case)
    reading.test_the_card_runs_without_a_warning(read_back, case)


@pytest.mark.parametrize("read_back", ["transformers-newest"], indirect=True)
@pytest.mark.parametrize("case", OTHER_MIXERS)
def test_other_ways_of_loading(read_back, case):
    reading.test_other_ways_of_loading(read_back, case)
