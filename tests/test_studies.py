"""Studies: every role has a network, and the committed weights are what their cards say.

Weights are trained again only for a few steps: sums are rounded differently on another CPU, so a
whole training ends in other weights of the same quality there, and no test could compare them.
"""

import dataclasses
import json
import math

import pytest
import torch
from scipy import stats
from torch import nn

from lib import records, studies
from lib.__main__ import main
from lib.studies import CHECKPOINTS, Lab, Role, images, load_study, networks, training
from lib.studies.scenes import TASKS
from lib.studies.training import Recipe

SIZE = 2_500_000  # bytes, of one file of weights
GOOD = 0.6  # chance is 1/16, and either factor alone gives 1/4


@pytest.fixture(scope="module")
def lab():
    return load_study("lab")


@pytest.fixture(scope="module")
def scenes():
    return images.scene_images(512)


# Roles --------------------------------------------------------------------------------------------


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


@pytest.mark.parametrize("name", ["vti", "vit_untrained_untrained", "_untrained", ""])
def test_an_unknown_role_is_one_sentence_that_says_where_the_known_ones_are(lab, name):
    for ask in (lab.role, lab.model, lab.train, lab.is_trained):
        with pytest.raises(ValueError, match=f"no role {name!r}") as error:
            ask(name)
        text = one_sentence(error)
        assert "'lab'" in text
        assert "is it 'vit" in text
        assert "python -m lib studies" in text
        assert "<role>_untrained" in text


def test_what_can_be_measured_has_weights_or_needs_none(lab, monkeypatch):
    asked = ["resnet", "vit_data_10", "vit", "vti", "vit_data_10_untrained", "vti_untrained"]
    monkeypatch.setitem(lab.__dict__, "cards", {"vit": {}, "resnet": {}})
    assert lab.those(*asked) == ["resnet", "vit", "vit_data_10_untrained"]
    public = load_study("imagenet-small")
    assert public.those("vit_other_seed", "resnet_untrained", "vit") == ["resnet_untrained", "vit"]


def test_shares_are_of_what_the_family_had(lab, monkeypatch):
    assert [lab.share(role) for role in ("vit", "vit_data_10", "resnet_data_03")] == [1, 0.1, 0.03]
    small = load_study("tiny-imagenet-small")
    recipes = {role: dataclasses.asdict(small.role(role).recipe) for role in small.roles}
    cards = {role: {"recipe": recipe} for role, recipe in recipes.items()}
    monkeypatch.setattr(type(small), "cards", cards)
    assert small.share("vit_data_10") == 0.1
    assert small.share("vit_other_seed") == 1
    cards["vit_data_10"]["recipe"]["distinct"] = 1200  # the card knows better than the name
    assert small.share("vit_data_10") == 0.05
    monkeypatch.setattr(type(small), "cards", {})
    assert (small.share("vit_data_10"), small.share("vit")) == (0.1, 1)


def test_images_say_what_is_known_about_them():
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert (images.Images(pixels).labelled, images.Images(pixels).boxed) == (False, False)
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]])
    known = images.Images(pixels, torch.zeros(2, dtype=torch.long), boxes)
    assert (known.labelled, known.boxed) == (True, True)
    boxes[1, 3] = torch.nan
    assert not images.Images(pixels, boxes=boxes).boxed


def test_an_unknown_study_is_one_sentence_that_names_the_known_ones():
    with pytest.raises(ValueError, match="no study 'labs'; there is lab") as error:
        load_study("labs")
    one_sentence(error)


def test_the_study_shows_its_roles(lab):
    assert repr(lab) == f"Study 'lab' with the roles {', '.join(lab.roles)}"
    assert len(lab.classes) == 16


@pytest.mark.parametrize(
    ("study", "anew"),
    [
        ("lab-third-seed", {"vit", "resnet"}),
        ("lab-long", {"vit", "vit_other_seed"}),
        ("lab-masked", {"vit", "vit_other_seed"}),
        ("lab-faint", {"vit", "vit_other_seed", "vit_gap", "resnet", "resnet_other_seed"}),
    ],
)
def test_what_was_not_trained_anew_is_the_labs_own(lab, study, anew):
    again = load_study(study)
    assert anew <= set(again.roles) < set(lab.roles)
    for name in again.roles:
        home = CHECKPOINTS / study if name in anew else CHECKPOINTS
        assert again.weights(name) == home / f"{name}.safetensors"
        assert (again.role(name) != lab.role(name)) == (name in anew)


def test_a_third_seed_is_neither_of_the_labs(lab):
    third = load_study("lab-third-seed")
    for family in ("vit", "resnet"):
        recipe = third.role(family).recipe
        twins = [lab.role(name).recipe for name in (family, f"{family}_other_seed")]
        assert [dataclasses.replace(recipe, seed=twin.seed) for twin in twins] == twins
        assert len({recipe.seed, *(twin.seed for twin in twins)}) == 3
    # What was trained further, or stopped on the way, is another network's.
    assert not [name for name in third.roles if "tuned" in name or "after" in name]
    assert third.has("vit_data_03", "resnet_data_03", "vit_gap", "mixer", "vit_no_skip_middle")


def test_what_the_lab_has_trained_is_not_trained_again(lab, tmp_path, monkeypatch, capsys):
    longer = load_study("lab-long")
    assert longer.is_trained("resnet")
    assert longer.cards["resnet"] == lab.cards["resnet"]
    theirs = longer.model("resnet").state_dict()
    assert all(torch.equal(theirs[key], w) for key, w in lab.model("resnet").state_dict().items())
    # Where weights are missing, a sentence says how to make them.
    monkeypatch.setattr(studies, "CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="lib train --study lab-long vit") as error:
        longer.model("vit")
    assert "lab-long/" in one_sentence(error)
    monkeypatch.undo()
    assert main(["train", "--study", "lab-long", "resnet"]) == 0
    assert "nothing to do: resnet" in capsys.readouterr().out


def test_every_role_is_a_network_of_the_lab_and_says_what_it_is_for(lab):
    for name, role in lab.roles.items():
        assert role.architecture in networks.ARCHITECTURES
        assert len(role.purpose) > 10
        assert lab.role(name) is lab.role(f"{name}_untrained") is role


def test_a_twin_from_another_seed_differs_in_nothing_else(lab):
    twins = [name for name in lab.roles if name.endswith("_other_seed")]
    assert twins
    for name in twins:
        twin, role = lab.roles[name], lab.roles[name.removesuffix("_other_seed")]
        assert twin.architecture == role.architecture
        assert twin.recipe.seed != role.recipe.seed
        assert dataclasses.replace(twin.recipe, seed=role.recipe.seed) == role.recipe


def test_a_role_that_starts_from_another_has_its_weights_and_a_classifier_of_its_own(lab):
    tuned = [name for name, role in lab.roles.items() if role.start]
    assert {lab.roles[name].task for name in tuned} == set(studies.TUNED_TO) < set(TASKS)
    for name in ("vit_tuned_colour", "resnet_tuned_fine_textures"):
        role = lab.roles[name]
        start, before = lab.model(role.start), lab.model(f"{name}_untrained")
        fresh = networks.build(role.architecture, role.recipe.seed).state_dict()
        for key, value in before.state_dict().items():
            head = key.startswith("head.")
            assert torch.equal(value, (fresh if head else start.state_dict())[key]), key
        weight = next(k for k in fresh if k.startswith("head.") and k.endswith("weight"))
        assert not torch.equal(fresh[weight], start.state_dict()[weight])


def test_images_are_test_scenes_on_which_no_network_was_trained(lab, scenes):
    assert torch.equal(lab.images(20).pixels, scenes.pixels[:20])
    trained = {image.numpy().tobytes() for image in images.SceneSet(2048)[torch.arange(2048)][0]}
    held_out = {image.numpy().tobytes() for image in images.scene_images(512, "val").pixels}
    for seed in (0, 1):
        shown = {image.numpy().tobytes() for image in lab.images(512, seed).pixels}
        assert len(shown) == 512
        assert shown.isdisjoint(trained)
        assert shown.isdisjoint(held_out)


def test_inputs_are_the_same_for_all_roles(lab, scenes):
    expected = (scenes.pixels[:4].double() / 255 - 0.5) * 4
    for name in lab.roles:
        found = lab.to_input(scenes.pixels[:4], name)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


# Untrained twins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Lab.roles)
def test_untrained_twins_are_reproducible_and_of_their_own_seed(lab, name):
    role = lab.roles[name]
    twin = lab.model(f"{name}_untrained")
    torch.manual_seed(99)  # whatever else went on
    again = lab.model(f"{name}_untrained")
    assert records.weights_hash(twin) == records.weights_hash(again)
    assert not any(module.training for module in twin.modules())
    for seed in (0, 1, 2):
        same = records.weights_hash(
            networks.build(role.architecture, seed)
        ) == records.weights_hash(twin)
        assert same == (seed == role.recipe.seed)


def test_building_a_network_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    networks.build("mixer", 5)
    assert torch.equal(torch.rand(3), expected)


def test_an_untrained_twin_is_not_trained(lab, tmp_path):
    with pytest.raises(ValueError, match="'vit_untrained' is not trained") as error:
        lab.train("vit_untrained", tmp_path, tmp_path)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


# A study that trains in a second ------------------------------------------------------------------


class Little(nn.Module):
    """Colours of a scene, at 8 x 8 pixels, into classes."""

    def __init__(self, size=None):
        super().__init__()
        self.pool = nn.AvgPool2d(4)
        self.head = nn.Linear(192, 16)

    def forward(self, x):
        return self.head(self.pool(x).flatten(1))


@pytest.fixture
def little(monkeypatch, tmp_path):
    """The lab with one role, ``little``, and folders of its own."""
    recipe = Recipe(images=512, distinct=256, batch_size=32, warmup_steps=4, seed=3)
    monkeypatch.setattr(Lab, "roles", {"little": Role("little", recipe, "as small as it gets")})
    monkeypatch.setitem(networks.ARCHITECTURES, "little", Little)
    monkeypatch.setattr(studies, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(studies, "TEST_IMAGES", 256)
    return Lab()


def train(study, tmp_path):
    return study.train("little", tmp_path / "runs", tmp_path / "checkpoints")


def test_training_writes_weights_and_a_card_that_is_true(little, tmp_path):
    card = train(little, tmp_path)
    kept = tmp_path / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["little.json", "little.safetensors"]
    assert json.loads((kept / "little.json").read_text()) == json.loads(json.dumps(card))
    assert Lab().cards == {"little": json.loads(json.dumps(card))}
    assert not (tmp_path / "runs" / "lab" / "little").exists()

    model = little.model("little")
    assert card["weights"] == records.weights_hash(model)
    assert card["weights"] != records.weights_hash(little.model("little_untrained"))
    test = images.scene_images(256)
    with torch.no_grad():
        right = int((model(little.to_input(test.pixels, "little")).argmax(1) == test.labels).sum())
    assert card["accuracy"] == right / 256
    low, high = card["accuracy_interval"]
    assert (low, high) == pytest.approx(training.accuracy_interval(right, 256), abs=1e-4)
    assert low < card["accuracy"] < high
    expected = {
        "study": "lab",
        "role": "little",
        "architecture": "little",
        "purpose": "as small as it gets",
        "parameters": 193 * 16,
        "multiply_adds": 192 * 16,
        "test_images": 256,
        "recipe": dataclasses.asdict(little.roles["little"].recipe),
    }
    assert {key: card[key] for key in expected} == expected
    assert card["seconds"] >= 0
    assert card["device"].startswith("CPU, ")
    assert card["provenance"].keys() >= {"date", "python", "torch", "timm", "code"}
    assert [point["images"] for point in card["curve"]] == list(range(32, 513, 32))
    for point in card["curve"]:
        assert 0 < point["loss"] < 10
        assert 0 <= point["accuracy"] <= 1


def test_the_card_speaks_of_the_weights_of_the_recipe(little, tmp_path):
    train(little, tmp_path)
    recipe = little.roles["little"].recipe
    model = networks.build("little", recipe.seed)
    val = images.scene_images(16, "val")
    data = images.SceneSet(256)
    training.train(model, recipe, data, (val.pixels, val.labels), tmp_path / "again")
    model.load_state_dict(training.unpack(training.pack(model.state_dict())))
    assert records.weights_hash(model) == little.cards["little"]["weights"]


def test_an_interrupted_training_goes_on(little, tmp_path, monkeypatch):
    card = train(little, tmp_path / "whole")
    take, asked = images.SceneSet.__getitem__, []

    def interrupted(self, indices):
        asked.append(indices)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return take(self, indices)

    monkeypatch.setattr(images.SceneSet, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(little, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert not little.is_trained("little", tmp_path / "checkpoints")
    again = train(little, tmp_path)
    assert len(asked) == 7 + 10  # of 16 steps, six were done
    for fact in ("weights", "accuracy", "curve"):
        assert again[fact] == card[fact]


def test_trained_means_by_the_recipe_of_today(little, tmp_path, monkeypatch):
    kept = tmp_path / "checkpoints"
    assert not little.is_trained("little", kept)
    train(little, tmp_path)
    assert little.is_trained("little", kept)
    assert not little.is_trained("little", tmp_path)
    role = little.roles["little"]
    other = dataclasses.replace(role, recipe=dataclasses.replace(role.recipe, lr=2e-3))
    monkeypatch.setitem(Lab.roles, "little", other)
    assert not little.is_trained("little", kept)
    monkeypatch.setitem(Lab.roles, "little", role)
    (kept / "little.safetensors").unlink()
    assert not little.is_trained("little", kept), "there is a card, but no weights"


def test_missing_weights_are_one_sentence_with_the_cure(little):
    with pytest.raises(FileNotFoundError, match="python -m lib train little") as error:
        little.model("little")
    assert "no weights for the role 'little'" in one_sentence(error)
    assert Lab().cards == {}
    assert little.model("little_untrained").head.out_features == 16


# The committed weights ----------------------------------------------------------------------------

# Roles of which a checkout may have no weights are those that only one chapter compares.
NEEDED = ("vit", "vit_other_seed", "vit_gap", "resnet", "resnet_other_seed", "mixer")
TRAINED = [name for name in Lab.roles if (CHECKPOINTS / f"{name}.safetensors").exists()]
each_role = pytest.mark.parametrize("name", dict.fromkeys([*NEEDED, *TRAINED]))


@pytest.fixture
def card(name):
    path = CHECKPOINTS / f"{name}.json"
    assert path.exists(), f"no card for {name}: train it with `python -m lib train {name}`"
    found = json.loads(path.read_text())
    assert "weights" in found, f"the card of {name} is a stub"
    return found


def test_weights_belong_to_roles_and_the_needed_ones_are_there():
    expected = {f"{name}.{kind}" for name in TRAINED for kind in ("json", "safetensors")}
    assert {path.name for path in CHECKPOINTS.iterdir() if path.is_file()} == expected
    assert set(NEEDED) <= set(TRAINED)


@each_role
def test_weights_are_those_of_the_card(lab, name, card):
    assert (CHECKPOINTS / f"{name}.safetensors").stat().st_size <= SIZE
    model = lab.model(name)  # loads strictly, see test_training.py
    assert records.weights_hash(model) == card["weights"]
    assert not any(module.training for module in model.modules())
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert (card["study"], card["role"]) == ("lab", name)
    assert card["parameters"] == sum(value.numel() for value in model.parameters())
    assert card["multiply_adds"] == networks.multiply_adds(model)


@each_role
def test_the_card_is_that_of_the_recipe(lab, name, card):
    role = lab.roles[name]
    assert lab.is_trained(name)
    assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(role.recipe)))
    assert card["architecture"] == role.architecture
    assert card["purpose"] == role.purpose
    assert card["curve"][-1]["images"] == role.recipe.end * role.recipe.batch_size
    assert len(card["curve"]) >= int(training.CURVE_POINTS * role.recipe.until)
    # From chance to its end, where the held-out accuracy is that of the test scenes.
    assert card["curve"][0]["loss"] == pytest.approx(math.log(16), abs=0.2)
    if role.recipe.until == 1:
        assert card["curve"][-1]["loss"] < card["curve"][0]["loss"] / 2
    assert card["curve"][-1]["accuracy"] == pytest.approx(card["accuracy"], abs=0.05)


@each_role
def test_accuracy_is_that_of_the_card(lab, name, card):
    scenes = images.scene_images(512, task=lab.roles[name].task)
    assert card["test_images"] == studies.TEST_IMAGES
    right = round(card["accuracy"] * card["test_images"])
    interval = training.accuracy_interval(right, card["test_images"])
    assert card["accuracy_interval"] == pytest.approx(list(interval), abs=1e-4)
    assert interval[0] < card["accuracy"] < interval[1]
    if name in NEEDED:
        assert card["accuracy"] >= GOOD

    measured = round(training.score(lab.model(name), scenes.pixels, scenes.labels) * len(scenes))
    # These are some of the scenes of the card, so the count is hypergeometric.
    low, high = stats.hypergeom.interval(0.999, card["test_images"], right, len(scenes))
    assert low <= measured <= high


@each_role
def test_a_trained_network_comes_from_its_own_untrained_twin(lab, name):
    # Training leaves a trace of the initial weights in the final ones, and none of another seed's.
    trained = lab.model(name).state_dict()
    seed, architecture = lab.roles[name].recipe.seed, lab.roles[name].architecture

    def likeness(start):
        random = [key for key, value in start.items() if value.dim() > 1 and "pos" not in key]
        pairs = ((trained[key].flatten(), start[key].flatten()) for key in random)
        a, b = map(torch.cat, zip(*pairs, strict=True))
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    own = likeness(lab.model(f"{name}_untrained").state_dict())
    others = [
        likeness(networks.build(architecture, seed + shift).state_dict()) for shift in (1, 2, 3)
    ]
    assert own > 0.1
    assert max(map(abs, others)) < own / 5


@pytest.mark.parametrize("name", [name for name in TRAINED if "_after_" in name])
def test_a_network_on_its_way_is_on_the_way_of_the_whole(lab, name):
    whole = lab.cards[name.partition("_after_")[0]]["curve"]
    every = whole[0]["images"]
    part = [point for point in lab.cards[name]["curve"] if point["images"] % every == 0]
    assert len(part) == int(training.CURVE_POINTS * lab.roles[name].recipe.until)
    # Rounding takes a second training off the way of the first.
    for one, other in zip(part, whole, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.06)


def test_networks_are_different_ones(lab):
    # (Roles that differ in their data start from the same weights.)
    hashes = {records.weights_hash(lab.model(name)) for name in TRAINED}
    hashes |= {records.weights_hash(lab.model(f"{name}_untrained")) for name in NEEDED}
    assert len(hashes) == len(TRAINED) + len(NEEDED)


def test_the_first_steps_can_be_repeated(lab, tmp_path):
    """The second point of the Mixer's curve, from scratch: half a minute on one core.

    The Mixer is the first to leave chance, whose loss is log 16 = 2.773 whatever the recipe. Other
    CPUs add up in another order, so the numbers agree only approximately there.
    """
    recipe, curve = lab.roles["mixer"].recipe, lab.cards["mixer"]["curve"][:2]
    val = images.scene_images(64, "val")
    data = images.SceneSet(recipe.distinct)
    again = training.train(
        lab.model("mixer_untrained"),
        recipe,
        data,
        (val.pixels, val.labels),
        tmp_path,
        stop_after=curve[-1]["images"] // recipe.batch_size,
    )
    assert [point["images"] for point in again] == [point["images"] for point in curve]
    assert again[0]["loss"] == pytest.approx(curve[0]["loss"], abs=0.002)
    assert again[1]["loss"] == pytest.approx(curve[1]["loss"], abs=0.01)
    assert again[1]["loss"] < math.log(16) - 0.05
