"""Checkpoints that lack something, or were written by something else, give what they have."""

import pytest
import torch
from interruption.runs import BATCHES, EPOCHS, Lesson, differences, ending, scaled, trained
from plugin_models import Call, same, stock
from selection import slow_but_for

from lightning_mixprec import PerLayerPrecision

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # The checkpoint has the states of callbacks that are not there.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]
OPTIONS = {"watching": (), "logger": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run and what it ended with; it leaves a checkpoint per epoch."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, ending(*trained(folder))


def at(whole, epoch):
    return whole[0] / "saved" / f"epoch={epoch}.ckpt"


def changed(whole, path, change):
    content = torch.load(at(whole, 1), weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def test_all_of_it_loads_with_weights_only(whole, tmp_path):
    end = ending(*trained(tmp_path, at(whole, 1), weights_only=True))
    end["losses"] = whole[1]["losses"][: 2 * BATCHES] + end["losses"]
    assert list(differences(end, whole[1])) == []


@pytest.mark.parametrize("gone", slow_but_for({"some"}, ["some", "all", "the key"]))
def test_without_the_callbacks_states_the_formats_and_the_scale_go_on_and_the_callbacks_begin(whole, tmp_path, gone):
    def drop(content):
        kept = [] if gone != "some" else ["UnderflowMonitor", "PrecisionScheduler"]
        content["callbacks"] = {name: content["callbacks"][name] for name in kept}
        if gone == "the key":
            del content["callbacks"]

    path = changed(whole, tmp_path / "bare.ckpt", drop)
    plugin_at_start = Call("on_train_start", lambda run, model: run.precision_plugin.state_dict())
    end = ending(*trained(tmp_path, path, callbacks=[plugin_at_start]))
    assert list(differences(plugin_at_start.results, [torch.load(path, weights_only=True)["PerLayerPrecision"]])) == []
    for what in ("formats", "history", "scale", "weights", "optimizers", "schedules", "step", "skipped"):
        assert list(differences(end[what], whole[1][what])) == [], what
    monitors, expected = end["monitors"], whole[1]["monitors"]
    assert monitors["AdaptivePrecision"]["decisions"] == []
    assert monitors["OverflowMonitor"]["events"] == []
    assert monitors["FidelityMonitor"]["latest"].keys() == expected["FidelityMonitor"]["latest"].keys()
    assert [came["phase"] for came in monitors["PrecisionScheduler"]["came"]] == [1, 2]


@pytest.mark.filterwarnings("ignore:step .* fp32's")
@pytest.mark.parametrize("format", slow_but_for({"fp16"}, ["fp32", "bf16", "fp16"]))
def test_a_stock_checkpoint_is_gone_on_from_by_all_callbacks(whole, tmp_path, format):
    model, _ = trained(tmp_path / "stock", plugin=stock(format) or [], max_epochs=1, **OPTIONS)
    scale = Call("on_train_start", lambda run, model: run.precision_plugin.scaler.get_scale())
    copied = Call("on_train_start", lambda run, model: {key: each.clone() for key, each in model.state_dict().items()})
    end = ending(*trained(tmp_path / "ours", tmp_path / "stock/saved/epoch=0.ckpt", callbacks=[scale, copied]))
    assert scale.results == [1024.0 if format == "fp16" else 2.0**20]
    assert same(copied.results, [dict(model.state_dict())])
    moves, expected = ({(entry["layer"], entry["to"]) for entry in each["history"]} for each in (end, whole[1]))
    assert moves == expected


@pytest.mark.parametrize("weights_only", [True, None])
@pytest.mark.parametrize("format", slow_but_for({"fp16"}, ["fp32", "bf16", "fp16"]))
def test_without_the_plugin_lightning_goes_on_from_it(whole, tmp_path, format, weights_only):
    """As from a stock checkpoint with the same weights, optimizer and progress, and without a scale."""
    ours_gone = {"PerLayerPrecision"}

    def drop(content):
        for name in ours_gone:
            del content[name]
        content["callbacks"] = {}

    bare = changed(whole, tmp_path / "bare.ckpt", drop)
    ends = []
    for number, path in enumerate([at(whole, 1), bare]):
        folder = tmp_path / str(number)
        model, run = trained(folder, path, plugin=stock(format) or [], weights_only=weights_only, **OPTIONS)
        ends.append([model.losses, model.state_dict(), run.optimizers[0].state_dict(), run.global_step])
        assert len(model.losses) == BATCHES * (EPOCHS - 2)
    assert list(differences(*ends)) == []


# Another name


class Renamed(PerLayerPrecision):
    """What a user makes of the plugin."""


def renamed():
    return scaled(Renamed)


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        pytest.param("PerLayerPrecision", renamed, id="the plugin under a subclass"),
        pytest.param("Renamed", scaled, id="a subclass under the plugin"),
        pytest.param("Renamed", renamed, id="a subclass under itself"),
    ],
)
def test_a_plugin_of_another_class_name_goes_on_with_scale_history_and_policy(whole, tmp_path, wrote, reads):
    def rename(content):
        content[wrote] = content.pop("PerLayerPrecision")

    end = ending(*trained(tmp_path, changed(whole, tmp_path / "renamed.ckpt", rename), plugin=reads()))
    end["losses"] = whole[1]["losses"][: 2 * BATCHES] + end["losses"]
    assert list(differences(end, whole[1])) == []


def test_a_state_under_another_name_is_refused_as_one_under_this_name(whole, tmp_path):
    path = changed(whole, tmp_path / "later.ckpt", lambda content: content["PerLayerPrecision"].update(version=9))
    with pytest.raises(ValueError, match="version 9, this release of lightning_mixprec reads up to 1"):
        trained(tmp_path, path, plugin=renamed())


def test_weights_of_a_checkpoint_load_without_lightning_or_the_package(whole):
    model = Lesson()
    model.load_state_dict(torch.load(at(whole, 2), weights_only=True)["state_dict"])
    assert same(dict(model.state_dict()), dict(whole[1]["weights"]))
