"""Which gradients are rounding noise in fp32, too, is measured now and then, and used where it still holds."""

import pytest

from lightning_mixprec.planning.agreement import Agreement, KnownNoise, LayerAgreement

OFF, STEADY = 0.5, 0.9999
SMALL, LARGE = 2.0**-20, 1.0


def agreement(**layers):
    """Of layers, each with its cosine and its share of the gradient in fp32."""
    each = {name: LayerAgreement(cosine, 1.0, share, share) for name, (cosine, share) in layers.items()}
    return Agreement(True, 0.0, each)


class Measured:
    def __init__(self, **layers):
        self.layers, self.times = layers, 0

    def __call__(self):
        self.times += 1
        return agreement(**self.layers)


@pytest.fixture
def measure():
    return Measured(noise=(OFF, SMALL), real=(STEADY, SMALL), large=(STEADY, LARGE))


SEEN = {"noise": (OFF, SMALL), "real": (OFF, SMALL), "large": (OFF, LARGE)}


def test_it_is_measured_once_for_sixteen_steps(measure):
    known = KnownNoise()
    for _ in range(16):
        assert [*known.taken_out_of(agreement(**SEEN), measure).layers] == ["real", "large"]
    assert measure.times == 1
    known.taken_out_of(agreement(**SEEN), measure)
    assert measure.times == 2


def test_a_gradient_that_has_grown_is_noise_no_more(measure):
    known = KnownNoise()
    known.taken_out_of(agreement(**SEEN), measure)
    assert "noise" in known.taken_out_of(agreement(**SEEN | {"noise": (OFF, LARGE)}), measure).layers
    assert measure.times == 1


@pytest.mark.parametrize("name", ["large", "another"])
def test_a_gradient_that_was_not_small_before_is_measured(measure, name):
    known = KnownNoise()
    known.taken_out_of(agreement(**SEEN), measure)
    measure.layers[name] = (OFF, SMALL)
    assert name not in known.taken_out_of(agreement(**SEEN | {name: (OFF, SMALL)}), measure).layers
    assert measure.times == 2
