"""Mistakes in what a Trainer is given: each ends the run before it begins, in one line that says what to do."""

from pathlib import Path

import pytest
import pytorch_lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from misuse_models import every_format, mixed, plain_task, watched, watchers
from plugin_models import Batches, fit, one_line, ours, trainer

from lightning_mixprec import MixPrecError, PerLayerPrecision


def refused(text):
    """What a user reads who trains with this policy file."""
    Path("policy.yaml").write_text(text, encoding="utf-8")
    model = plain_task()
    with pytest.raises(MixPrecError) as caught:
        watched(model, PerLayerPrecision("policy.yaml"))
    assert model.losses == []
    return one_line(caught)


# Policy files


@every_format
def test_an_unknown_key_of_a_rule_names_the_line_and_what_was_meant(format):
    said = refused(f"default: {format}\nrules:\n- layers: net.2\n  compute: fp32\n- layers: net.0\n  cmpute: fp32\n")
    assert said.startswith("policy.yaml:6: unknown key 'cmpute' in a rule, did you mean compute?")


@every_format
def test_an_unknown_key_beside_the_rules_names_the_line_and_what_was_meant(format):
    said = refused(f"default: {format}\nalow_unmatched: true\nrules:\n- layers: net.2\n  compute: fp32\n")
    assert said.startswith("policy.yaml:2: unknown key 'alow_unmatched' beside rules, did you mean allow_unmatched?")


def test_a_misspelled_format_names_the_line_and_what_was_meant():
    said = refused("default: bf16\n\nnet.2: fp23\n")
    assert said.startswith("policy.yaml:3: 'net.2': ")
    assert "unknown format 'fp23', did you mean 'fp32'?" in said


@every_format
def test_a_misspelled_layer_names_the_line_and_what_was_meant(format):
    said = refused(f"# head in full\ndefault: {format}\nnett.2: fp32\n")
    assert said.startswith("policy.yaml:3: rule 1 (nett.2) matches no layer of Task; did you mean net.2?")


@every_format
def test_a_misspelled_type_names_the_line_and_what_was_meant(format):
    said = refused(f"default: {format}\nrules:\n- types: Linaer\n  compute: fp32\n")
    assert said.startswith("policy.yaml:3: rule 1 (types Linaer) matches no layer of Task")
    assert "did you mean Linear?" in said


def test_a_misspelled_default_names_the_line_and_what_was_meant():
    assert refused("defalt: bf16\nnet.2: fp32\n").startswith("policy.yaml:1: the policy has no default")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(MixPrecError) as caught:
        PerLayerPrecision("polcy.yaml")
    assert one_line(caught) == "the policy file polcy.yaml does not exist; give the path of a YAML file"


# Precision given twice


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
def test_precision_beside_the_plugin_is_refused_by_lightning(precision):
    with pytest.raises(
        ValueError, match=r"Received both `precision=.*` and `plugins=.*PerLayerPrecision.*`. Choose one"
    ):
        trainer(PerLayerPrecision("fp16"), precision=precision)


def test_two_plugins_are_refused_by_lightning():
    with pytest.raises(MisconfigurationException, match="Received multiple values for Precision flags in `plugins`"):
        trainer([PerLayerPrecision("fp16"), PerLayerPrecision("bf16")])


# lightning and pytorch_lightning


def test_a_plugin_of_the_other_package_is_refused_by_lightnings_trainer():
    with pytest.raises(MisconfigurationException, match="Found invalid type for plugin"):
        trainer(pytorch_lightning.plugins.precision.Precision())


@every_format
def test_a_module_of_the_other_package_is_refused_by_lightnings_trainer(format):
    with pytest.raises(TypeError, match="Please switch to a single import style"):
        fit(pytorch_lightning.LightningModule(), ours(mixed(format)), callbacks=watchers())


# The wrong plugin for a callback


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_callback_that_acts_needs_the_plugin_and_says_so(precision):
    model = plain_task()
    run = trainer(precision=precision, callbacks=watchers())
    with pytest.raises(MixPrecError) as caught:
        run.fit(model, Batches(6))
    assert one_line(caught).endswith("use Trainer(plugins=PerLayerPrecision('fp16')).")
    assert model.losses == []
