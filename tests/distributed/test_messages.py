"""Messages between ranks and their bytes, counted: none in an ordinary step, and in a sample however many layers."""

from pathlib import Path

import pytest
from processes import saved_by

pytestmark = pytest.mark.slow
EVERY, BATCHES = 2, 3  # as in messages_script.py
SAMPLED = range(0, BATCHES, EVERY)


@pytest.fixture(scope="module", params=[2, 4, 8], ids="{} processes".format)
def ranks(request, tmp_path_factory):
    script = Path(__file__).parent / "messages_script.py"
    return saved_by(request.param, script, tmp_path_factory.mktemp("messages"))


def ours(results, layers, what, batch):
    """Number of messages and their bytes, without those that are sent when nobody watches."""
    watched, alone = results[layers][what][batch], results[layers]["alone"][batch]
    return len(watched) - len(alone), sum(size for _, size in watched) - sum(size for _, size in alone)


def test_an_ordinary_step_sends_what_it_sends_without_monitors(ranks):
    for results in ranks:
        for layers in (12, 36):
            for batch in set(range(BATCHES)) - set(SAMPLED):
                assert ours(results, layers, "watched", batch) == (0, 0)


def test_a_sample_sends_as_many_messages_and_bytes_however_many_layers_there_are(ranks):
    for results in ranks:
        first, many = (ours(results, layers, "watched", 0) for layers in (12, 36))
        assert first == many
        for batch in SAMPLED:
            for layers in (12, 36):
                messages, size = ours(results, layers, "watched", batch)
                assert 2 <= messages <= 2 * 2  # where gradients may be noise, fp32 is run again
                assert size <= 1.2 * first[1]  # a layer more whose output is compared


def test_of_all_layers_it_sends_as_many_messages_and_bytes_in_proportion(ranks):
    for results in ranks:
        (few, small), (many, large) = (ours(results, layers, "all", 0) for layers in (12, 36))
        assert few == many == 2
        assert small < large <= 3 * small


def test_all_ranks_send_the_same(ranks):
    assert all(results == ranks[0] for results in ranks)
