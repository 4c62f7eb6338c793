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

from lib import intervals, records
from lib.__main__ import main
from lib.studies import STUDIES, checkpoints, images, load_study, networks, study, training
from lib.studies import lab as labs
from lib.studies.lab import ROLES, Lab
from lib.studies.masked import MaskedRecipe
from lib.studies.recipes import Recipe
from lib.studies.scenes import TASKS
from lib.studies.study import WEIGHTS, TrainedRole
from lib.taps import collect

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


def test_shares_are_of_the_training_images(lab):
    shares = [lab.role(name).share for name in ("vit", "vit_data_10", "resnet_data_03_untrained")]
    assert shares == [1, 0.1, 0.03]
    for role in lab.roles.values():
        if not role.start:
            assert role.recipe.distinct == role.share * 160_000


def test_roles_are_data(lab):
    """(arm, replicate, family, cut, trained) of each."""
    expected = {
        "vit": ("vit", 0, "vit", None, True),
        "vit_other_seed": ("vit", 1, "vit", None, True),
        "vit_other_seed_untrained": ("vit", 1, "vit", None, False),
        "resnet_seed_3_untrained": ("resnet", 3, "resnet", None, False),
        "vit_gap": ("vit_gap", 0, "vit_gap", None, True),
        "vit_no_skip_late": ("vit_no_skip_late", 0, "vit", 6, True),
        "resnet_no_skip_middle_untrained": ("resnet_no_skip_middle", 0, "resnet", 6, False),
        "resnet_data_03": ("resnet_data_03", 0, "resnet", None, True),
        "vit_other_seed_tuned_colour": ("vit_tuned_colour", 1, "vit", None, True),
    }
    for name, facts in expected.items():
        role = lab.role(name)
        assert role.name == name
        assert (role.arm, role.replicate, role.family, role.cut, role.trained) == facts
        assert lab.find(role.arm, role.replicate, role.trained) is role
    assert lab.find("vit", 2) is lab.find("vit_gap", 1) is lab.find("vti") is None


def test_an_arm_has_ten_baselines_of_ten_seeds(lab):
    for chosen in (lab, load_study("lab-second"), load_study("imagenet-small")):
        roles = [chosen.find("vit", k, trained=False) for k in range(10)]
        seeds = [getattr(role, "recipe", role).seed for role in roles]
        assert len(set(seeds)) == len({role.name for role in roles}) == 10
        assert chosen.find("vit", 10, trained=False) is None
        assert not any(role.trained for role in roles)
        assert chosen.those(*(role.name for role in roles)) == [role.name for role in roles]
    assert lab.find("vit", 1, trained=False).name == "vit_other_seed_untrained"
    third = lab.find("vit", 3, trained=False)
    expected = records.weights_hash(networks.build("vit", 3))
    assert records.weights_hash(lab.model(third.name)) == expected


def test_the_second_editions_lab():
    chosen = load_study("lab-second")
    arms = {}
    for role in chosen.roles.values():
        arms.setdefault(role.arm, []).append(role)
    two = ("vit_no_skip_middle", "resnet_no_skip_middle", "vit_data_01", "vit_data_03")
    two += ("vit_data_10", "resnet_data_03", "resnet_data_10", "mixer", "vit_masked")
    two += ("vit_adamw", "resnet_adamw")
    counts = dict.fromkeys(("vit", "vit_gap", "resnet"), 5) | dict.fromkeys(two, 2)
    assert {arm: len(roles) for arm, roles in arms.items()} == counts
    for arm, roles in arms.items():
        assert [role.replicate for role in roles] == list(range(len(roles)))
        assert [role.recipe.seed for role in roles] == list(range(len(roles)))
        assert [role.name for role in roles[1:]] == [
            f"{arm}_seed_{k}" for k in range(1, len(roles))
        ]
        recipe = roles[0].recipe
        if arm.endswith("adamw"):
            assert recipe == Recipe()
            continue
        shown = {"resnet": 51_200, "vit_masked": 160_000}
        shown = shown.get("resnet" if arm.startswith("resnet") else arm, 80_000)
        assert (recipe.optimiser, recipe.images) == ("muon", shown)
        assert recipe.distinct == round(shown * roles[0].share)
        assert recipe.distinct % 32 == 0
        assert recipe.fade == (0.3 if arm == "vit_no_skip_middle" else 0)
        assert isinstance(recipe, MaskedRecipe) == (arm == "vit_masked")
    assert (chosen.role("vit_data_01").share, chosen.role("resnet_data_03").share) == (0.01, 0.03)
    for name in chosen.roles:
        assert chosen.weights(name) == WEIGHTS / "lab-second" / f"{name}.safetensors"


def test_every_study_of_the_registry_loads_by_its_name():
    titles = [entry.title for entry in STUDIES.values()]
    assert len(set(titles)) == len(titles)
    shared = ("cards", "images", "to_input", "model", "classes")
    for name, entry in STUDIES.items():
        assert len(entry.purpose) > 20
        if not entry.load:
            continue
        chosen = load_study(name)
        assert (chosen.name, chosen.purpose) == (name, entry.purpose)
        assert {"vit", "resnet"} <= set(chosen.roles)
        assert all(hasattr(type(chosen), attribute) for attribute in shared)
        for role in (*chosen.roles.values(), *chosen.baselines.values()):
            assert chosen.role(role.name) is role


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


def test_studies_of_which_results_are_kept_are_one_sentence():
    kept = [name for name, entry in STUDIES.items() if not entry.load]
    assert len(kept) == 5
    for name in kept:
        assert (records.ROOT / "book" / "results" / name / "results.json").is_file()
        with pytest.raises(ValueError, match=f"{name!r} only the results are kept, in book") as e:
            load_study(name)
        one_sentence(e)


def test_the_study_shows_its_roles(lab):
    assert repr(lab) == f"Study 'lab' with the roles {', '.join(lab.roles)}"
    assert len(lab.classes) == 16


def test_every_role_is_a_network_of_the_lab_and_says_what_it_is_for(lab):
    for name, role in lab.roles.items():
        assert role.architecture in networks.ARCHITECTURES | networks.CUTS
        assert len(role.purpose) > 10
        untrained = dataclasses.replace(role, name=f"{name}_untrained", trained=False)
        assert lab.role(f"{name}_untrained") == untrained


def test_another_seed_differs_in_nothing_else(lab):
    others = [name for name in lab.roles if name.endswith("_other_seed")]
    assert others
    for name in others:
        other, role = lab.roles[name], lab.roles[name.removesuffix("_other_seed")]
        assert other.architecture == role.architecture
        assert other.recipe.seed != role.recipe.seed
        assert dataclasses.replace(other.recipe, seed=role.recipe.seed) == role.recipe


def test_a_role_that_starts_from_another_has_its_weights_and_a_classifier_of_its_own(lab):
    tuned = [name for name, role in lab.roles.items() if role.start]
    assert {lab.roles[name].task for name in tuned} == set(labs.TUNED_TO) < set(TASKS)
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


# Baselines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROLES)
def test_baselines_are_reproducible_and_of_their_own_seed(lab, name):
    role = lab.roles[name]
    baseline = lab.model(f"{name}_untrained")
    torch.manual_seed(99)  # whatever else went on
    again = lab.model(f"{name}_untrained")
    assert records.weights_hash(baseline) == records.weights_hash(again)
    assert not any(module.training for module in baseline.modules())
    for seed in (0, 1, 2):
        expected = records.weights_hash(networks.build(role.architecture, seed))
        assert (records.weights_hash(baseline) == expected) == (seed == role.recipe.seed)


def test_building_a_network_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    networks.build("mixer", 5)
    assert torch.equal(torch.rand(3), expected)


def test_a_baseline_is_not_trained(lab, tmp_path):
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
    monkeypatch.setitem(networks.ARCHITECTURES, "little", Little)
    monkeypatch.setattr(study, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(labs, "TEST_IMAGES", 256)
    return with_recipe(Recipe(images=512, distinct=256, batch_size=32, warmup_steps=4, seed=3))


def with_recipe(recipe):
    return Lab(roles={"little": TrainedRole("little", recipe, "as small as it gets")})


def train(chosen, tmp_path):
    return chosen.train("little", tmp_path / "runs", tmp_path / "weights")


def test_training_writes_weights_and_a_card_that_is_true(little, tmp_path):
    card = train(little, tmp_path)
    kept = tmp_path / "weights"
    assert sorted(path.name for path in kept.iterdir()) == ["little.json", "little.safetensors"]
    assert json.loads((kept / "little.json").read_text()) == json.loads(json.dumps(card))
    assert with_recipe(little.roles["little"].recipe).cards == {
        "little": json.loads(json.dumps(card))
    }
    assert not (tmp_path / "runs" / "lab" / "little").exists()

    model = little.model("little")
    assert card["weights"] == records.weights_hash(model)
    assert card["weights"] != records.weights_hash(little.model("little_untrained"))
    test = images.scene_images(256)
    with torch.no_grad():
        right = int((model(little.to_input(test.pixels, "little")).argmax(1) == test.labels).sum())
    assert card["accuracy"] == right / 256
    low, high = card["accuracy_interval"]
    expected = intervals.share(right, 256)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)
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
    model.load_state_dict(checkpoints.unpack(checkpoints.pack(model.state_dict())))
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
    assert not (tmp_path / "weights").exists()
    assert not little.is_trained("little", tmp_path / "weights")
    again = train(little, tmp_path)
    assert len(asked) == 7 + 10  # of 16 steps, six were done
    for fact in ("weights", "accuracy", "curve"):
        assert again[fact] == card[fact]


def test_trained_means_by_the_recipe_of_today(little, tmp_path):
    kept = tmp_path / "weights"
    assert not little.is_trained("little", kept)
    train(little, tmp_path)
    assert little.is_trained("little", kept)
    assert not little.is_trained("little", tmp_path)
    recipe = little.roles["little"].recipe
    assert not with_recipe(dataclasses.replace(recipe, lr=2e-3)).is_trained("little", kept)
    # A field that recipes did not have yet when the card was written has its default there.
    card = json.loads((kept / "little.json").read_text())
    del card["recipe"]["until"]
    (kept / "little.json").write_text(json.dumps(card))
    assert little.is_trained("little", kept)
    assert not with_recipe(dataclasses.replace(recipe, until=0.5)).is_trained("little", kept)
    (kept / "little.safetensors").unlink()
    assert not little.is_trained("little", kept), "there is a card, but no weights"


def test_what_is_trained_is_not_trained_again(capsys):
    assert main(["train", "mixer"]) == 0
    assert "nothing to do: mixer" in capsys.readouterr().out


def test_missing_weights_are_one_sentence_with_the_cure(little):
    with pytest.raises(FileNotFoundError, match="python -m lib train --study lab little") as error:
        little.model("little")
    assert "no weights for the role 'little'" in one_sentence(error)
    assert little.cards == {}
    assert little.model("little_untrained").head.out_features == 16
    # Those of other studies than the lab have a folder of their own.
    second = load_study("lab-second")
    with pytest.raises(FileNotFoundError, match="lib train --study lab-second mixer") as error:
        second.model("mixer")
    assert "in lab-second/" in one_sentence(error)


# The committed weights ----------------------------------------------------------------------------

# Roles of which a checkout may have no weights are those that only one chapter compares.
NEEDED = ("vit", "vit_other_seed", "vit_gap", "resnet", "resnet_other_seed", "mixer")
TRAINED = [name for name in ROLES if (WEIGHTS / f"{name}.safetensors").exists()]
each_role = pytest.mark.parametrize("name", dict.fromkeys([*NEEDED, *TRAINED]))


@pytest.fixture
def card(name):
    path = WEIGHTS / f"{name}.json"
    assert path.exists(), f"no card for {name}: train it with `python -m lib train {name}`"
    found = json.loads(path.read_text())
    assert "weights" in found, f"the card of {name} is a stub"
    return found


def test_weights_belong_to_roles_and_the_needed_ones_are_there():
    expected = {f"{name}.{kind}" for name in TRAINED for kind in ("json", "safetensors")}
    assert {path.name for path in WEIGHTS.iterdir() if path.is_file()} == expected
    assert set(NEEDED) <= set(TRAINED)


@each_role
def test_weights_are_those_of_the_card(lab, name, card):
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= SIZE
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
    assert card["test_images"] == labs.TEST_IMAGES
    right = round(card["accuracy"] * card["test_images"])
    expected = intervals.share(right, card["test_images"])
    assert card["accuracy_interval"] == pytest.approx([expected.low, expected.high], abs=1e-4)
    assert expected.low < card["accuracy"] < expected.high
    if name in NEEDED:
        assert card["accuracy"] >= GOOD

    measured = round(training.score(lab.model(name), scenes.pixels, scenes.labels) * len(scenes))
    # These are some of the scenes of the card, so the count is hypergeometric.
    low, high = stats.hypergeom.interval(0.999, card["test_images"], right, len(scenes))
    assert low <= measured <= high


@each_role
def test_a_trained_network_comes_from_its_own_baseline(lab, name):
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


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_weights_in_8_bits_are_as_good_as_in_32(lab, name):
    scenes, whole, packed = lab.images(2048), lab.model(name), lab.model(name)
    packed.load_state_dict(checkpoints.unpack(checkpoints.pack(whole.state_dict())))
    kinds = {key: value.dtype for key, value in checkpoints.pack(whole.state_dict()).items()}
    assert sum(kind == torch.int8 for kind in kinds.values()) > 20
    assert kinds.get("pos_embed", torch.float16) == torch.float16
    scores = [training.score(model, scenes.pixels, scenes.labels) for model in (whole, packed)]
    assert scores[0] == pytest.approx(scores[1], abs=0.005)
    x = lab.to_input(scenes.pixels[:256], name)
    features = [list(collect(model, x, "blocks").values()) for model in (whole, packed)]
    for one, other in zip(*features, strict=True):
        assert cka(one, other) > 0.999


def cka(*features):
    """Linear CKA of two layers' features of the same images, in float64."""
    grams = []
    for x in features:
        x = x.flatten(1).double()
        x -= x.mean(0)
        grams.append((x @ x.mT).flatten())
    return float(torch.nn.functional.cosine_similarity(*grams, dim=0))
