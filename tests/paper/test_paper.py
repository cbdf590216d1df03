"""The paper's experiments: the network, the exchange and its accounts, and the laws that rates follow."""

import json
import math
import zlib
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcomm
from qcomm import RangeGrid
from qcomm.paper import lossless, lzw
from qcomm.paper.ablation import shrinkage
from qcomm.paper.data import Vectors, load
from qcomm.paper.evaluation import best_accuracy, convergence_epoch, epochs_to_level, paired, select, spread
from qcomm.paper.exchange import contraction, layer_rates, mean, parcel_bits, receive, send
from qcomm.paper.network import (
    BIAS_COUNT,
    LAYERS,
    SIZES,
    WEIGHT_COUNTS,
    Layer,
    accuracy,
    check_finite,
    clone,
    gradients,
    initial,
    train_epoch,
)
from qcomm.paper.settings import INITS, Exchange, Settings
from qcomm.paper.training import PROBE_BITS, PROBE_FRACTIONS, probe, train
from qcomm.recipes.errors import RecipeError

PAPER = Exchange("grid")
SMALL = Settings(dataset="digits", epochs=2, train_images=200)


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_network(seed=0, init="gaussian"):
    return [
        Layer(weight, torch.randn(len(weight), generator=generator(seed)))
        for weight, _ in initial(init, generator(seed))
    ]


class TestNetwork:
    def test_sizes_are_the_papers(self):
        assert SIZES == (784, 392, 50, 10)
        assert WEIGHT_COUNTS == (307_328, 19_600, 500) and sum(WEIGHT_COUNTS) == 327_428

    def test_gradients_are_autograds(self):
        network = random_network()
        images, targets = torch.randn(7, 784, generator=generator(1)), torch.rand(7, 10, generator=generator(2))
        twin = nn.Sequential(*(part for i, o in pairwise(SIZES) for part in (nn.Linear(i, o), nn.Tanh())))
        for module, (weight, bias) in zip(twin[::2], network, strict=True):
            module.weight.data, module.bias.data = weight.clone(), bias.clone()
        ((twin(images) - targets).square().sum() / (2 * len(images))).backward()
        for module, (weight, bias) in zip(twin[::2], gradients(network, images, targets), strict=True):
            torch.testing.assert_close(weight, module.weight.grad)
            torch.testing.assert_close(bias, module.bias.grad)

    def test_an_epoch_of_one_batch_is_a_step_along_the_gradient(self):
        network = random_network()
        data = Vectors(torch.randn(20, 784, generator=generator(1)), torch.arange(20) % 10)
        expected = gradients(network, data.images, data.targets())
        moved = clone(network)
        train_epoch(moved, data, data.targets(), 20, 0.5, generator())
        for (weight, bias), (new_weight, new_bias), (dw, db) in zip(network, moved, expected, strict=True):
            torch.testing.assert_close(new_weight, weight - 0.5 * dw)
            torch.testing.assert_close(new_bias, bias - 0.5 * db)

    def test_images_that_fill_no_batch_are_refused(self):
        data = Vectors(torch.zeros(19, 784), torch.zeros(19, dtype=torch.int64))
        with pytest.raises(RecipeError, match="--batch-size is 20; a worker's 19 training images"):
            train_epoch(random_network(), data, data.targets(), 20, 0.1, generator())

    @pytest.mark.parametrize("init", INITS)
    def test_initial_weights_have_the_named_distribution(self, init):
        weight = initial(init, generator())[0].weight
        bound = 1 / math.sqrt(784)
        assert weight.std().item() == pytest.approx(0.01 if init == "small" else bound / math.sqrt(3), rel=0.01)
        kurtosis = (weight.double() ** 4).mean() / (weight.double() ** 2).mean() ** 2
        assert kurtosis.item() == pytest.approx(1.8 if init == "uniform" else 3.0, abs=0.05)

    def test_accuracy_counts_the_largest_output(self):
        network = [Layer(torch.zeros(o, i), torch.zeros(o)) for i, o in pairwise(SIZES)]
        network[-1].bias[3] = 1.0
        data = Vectors(torch.zeros(1500, 784), torch.arange(1500) % 10)
        assert accuracy(network, data) == 0.1

    @pytest.mark.parametrize(("layer", "name"), [(0, r"layer 1 \(784 -> 392\)"), (2, r"layer 3 \(50 -> 10\)")])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_the_layer_that_is_not_finite_is_named(self, layer, name, value):
        network = random_network()
        check_finite(network, "here")
        network[layer].weight[1, 2] = value
        with pytest.raises(RecipeError, match=f"here: 1 of {WEIGHT_COUNTS[layer]} weights of {name} are NaN"):
            check_finite(network, "here")


class TestExchange:
    @pytest.mark.parametrize("kind", ["float", "grid", "decay", "noise"])
    def test_what_is_received_is_near_what_was_sent(self, kind):
        network, exchange = random_network(), Exchange(kind, c=6)
        received = receive(send(network, exchange, generator()), exchange)
        for (weight, bias), (other, other_bias) in zip(network, received, strict=True):
            width = (weight.max() - weight.min()).item()
            error = (weight - other).abs().max().item()
            assert error <= width / 2**9
            assert (error == 0.0) == (kind == "float")
            assert torch.equal(bias, other_bias)

    @pytest.mark.parametrize("kind", ["decay", "noise"])
    def test_constant_weights_have_no_bins_and_stay(self, kind):
        network = [Layer(torch.full_like(weight, 0.5), bias) for weight, bias in random_network()]
        received = receive(send(network, Exchange(kind), generator()), Exchange(kind))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(network, received, strict=True))

    def test_decay_contracts_by_a_bin_and_noise_does_not(self):
        network = random_network()
        for kind, expected in (("decay", 2.0**-9), ("noise", 0.0)):
            exchange = Exchange(kind, c=6, entropy_bits=4)
            assert RangeGrid(c=6).bits_for(qcomm.estimate_entropy(network[0].weight)) == 9
            received = receive(send(network, exchange, generator(9)), exchange)
            assert contraction(network[0].weight, received[0].weight) == pytest.approx(expected, abs=2e-5)

    def test_noise_has_the_variance_of_a_bin(self):
        weight = random_network()[0].weight
        received = receive(send(random_network(), Exchange("noise", c=6), generator(9)), Exchange("noise", c=6))
        step = ((weight.max() - weight.min()) / 2**9).item()
        assert (received[0].weight - weight).std().item() == pytest.approx(step / math.sqrt(12), rel=0.01)

    def test_the_mean_is_that_of_the_decoded_networks_in_order(self):
        networks = [random_network(seed) for seed in range(3)]
        parcels = [send(network, PAPER, generator()) for network in networks]
        decoded = [receive(parcel, PAPER) for parcel in parcels]
        for k, (weight, bias) in enumerate(mean(parcels, PAPER)):
            assert torch.equal(weight, (decoded[0][k].weight + decoded[1][k].weight + decoded[2][k].weight) / 3)
            assert torch.equal(bias, (networks[0][k].bias + networks[1][k].bias + networks[2][k].bias) / 3)

    def test_the_mean_leaves_what_was_sent_alone(self):
        network = random_network()
        before = clone(network)
        mean([send(network, Exchange(), generator()), send(random_network(1), Exchange(), generator())], Exchange())
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(network, before, strict=True))

    def test_rates_are_of_the_bytes_sent(self):
        parcel = send(random_network(), PAPER, generator())
        rates = layer_rates(parcel, PAPER)
        for rate, packet, count in zip(rates, parcel, WEIGHT_COUNTS, strict=False):
            assert rate.packet == 8 * packet.numel() / count
            assert rate.symbol_entropy <= rate.huffman < min(rate.symbol_entropy + 1, rate.packet)
        total = sum(rate.packet * count for rate, count in zip(rates, WEIGHT_COUNTS, strict=True)) + 32 * BIAS_COUNT
        assert parcel_bits(parcel) == pytest.approx(total / (sum(WEIGHT_COUNTS) + BIAS_COUNT))

    def test_floats_cost_32_bits(self):
        parcel = send(random_network(), Exchange(), generator())
        assert parcel_bits(parcel) == 32
        assert all(rate[:3] == (32, 32, 32) for rate in layer_rates(parcel, Exchange()))

    @given(st.integers(0, 2**32), st.sampled_from(["center", "endpoint"]))
    @settings(deadline=None, max_examples=10)
    def test_exchange_again_is_the_identity_for_endpoints_alone(self, seed, reconstruction):
        weight = torch.randn(3000, generator=generator(seed))
        grid = RangeGrid(num_bits=6, reconstruction=reconstruction)
        once = qcomm.decompress(qcomm.compress(weight, grid))
        twice = qcomm.decompress(qcomm.compress(once, grid))
        if reconstruction == "endpoint":
            torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)
        else:
            assert contraction(once, twice) == pytest.approx(2.0**-6, rel=1e-3)

    def test_centers_shrink_by_the_power_that_arithmetic_says(self):
        for bits in (6, 8):
            assert shrinkage(bits, "center")[-1] == pytest.approx((1 - 2.0**-bits) ** 100, rel=1e-3)
        assert shrinkage(6, "endpoint")[-1] == pytest.approx(1.0, abs=1e-5)


class TestIdentity:
    """The Huffman rate of smooth weights is H_M + N - M: each further bit of N is paid for in full."""

    @pytest.mark.parametrize("c", [2, 5, 6])
    @pytest.mark.parametrize("init", INITS)
    def test_of_smooth_weights(self, init, c):
        network = initial(init, generator(c))
        exchange = Exchange("grid", c=c)
        rate = layer_rates(send(network, exchange, generator()), exchange)[0]
        entropy = qcomm.estimate_entropy(network[0].weight, 4, 1.0)
        assert rate.raw == math.ceil(qcomm.estimate_entropy(network[0].weight) + c)
        assert rate.huffman == pytest.approx(entropy + rate.raw - 4, abs=0.05)

    def test_hence_one_more_bit_costs_one_bit(self):
        rates = [
            layer_rates(send(random_network(), Exchange("grid", c=c), generator()), Exchange("grid", c=c))[0]
            for c in (5, 6)
        ]
        assert rates[1].huffman - rates[0].huffman == pytest.approx(1.0, abs=0.05)

    def test_it_does_not_hold_for_atoms(self):
        weight = torch.cat([torch.zeros(90_000), torch.randn(10_000, generator=generator())])
        info = qcomm.inspect(qcomm.compress(weight, RangeGrid(num_bits=9, reconstruction="center")))
        assert info.entropy_bits < qcomm.estimate_entropy(weight, 4, 1.0) + 9 - 4 - 1


class TestTraining:
    def test_learns_and_measures_every_epoch(self):
        trained = train(Settings(dataset="digits", epochs=3, learning_rate=0.1))
        history = trained.history
        assert history["test_accuracy"][-1] > 0.85
        assert history["train_loss"][-1] < history["train_loss"][0]
        assert {len(values) for values in history.values()} == {3}
        assert all(len(values) == LAYERS for name in ("entropy", "contraction", "probe") for values in history[name])
        json.dumps(history, allow_nan=False)

    def test_equal_settings_give_equal_weights_and_other_seeds_do_not(self):
        first, again = train(SMALL), train(SMALL)
        other = train(Settings(dataset="digits", epochs=2, train_images=200, seed=1))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(first.network, again.network, strict=True))
        assert not torch.equal(first.network[0].weight, other.network[0].weight)

    def test_divergence_stops_with_the_layers_name(self):
        """A learning rate that diverges on one processor saturates on another, so the NaN is planted."""

        def diverging(network, *arguments):
            loss = train_epoch(network, *arguments)
            network[1].weight[3, 5] = math.nan
            return loss

        with (
            mock.patch("qcomm.paper.training.train_epoch", diverging),
            pytest.raises(RecipeError, match=r"float-uniform-seed0, epoch 1, worker 0: 1 of .* weights of layer 2 \("),
        ):
            train(Settings(dataset="digits", epochs=1, train_images=40))

    def test_the_probe_of_all_weights_is_the_librarys_entropy(self):
        weight = random_network()[1].weight
        found = probe(weight, generator())
        for row, bits in zip(found, PROBE_BITS, strict=True):
            assert row[PROBE_FRACTIONS.index(1.0)] == pytest.approx(qcomm.estimate_entropy(weight, bits, 1.0), abs=1e-3)

    def test_constant_weights_have_no_entropy(self):
        assert probe(torch.ones(50, 10), generator()) == [[0.0] * len(PROBE_FRACTIONS)] * len(PROBE_BITS)

    def test_three_percent_of_the_last_layer_is_too_few(self):
        found = probe(random_network()[2].weight, generator())[PROBE_BITS.index(4)]
        assert found[PROBE_FRACTIONS.index(0.03)] < found[PROBE_FRACTIONS.index(1.0)] - 0.2


class TestData:
    def test_splits_are_disjoint_and_scaled(self):
        data = load("digits")
        assert (len(data.train), len(data.validation), len(data.test)) == (1127, 225, 445)
        everything = torch.cat([data.train.images, data.validation.images])
        assert len(torch.unique(everything, dim=0)) == len(torch.unique(data.train.images, dim=0)) + len(
            torch.unique(data.validation.images, dim=0)
        )
        assert abs(everything.mean().item()) < 0.2

    def test_shares_are_all_images_once(self):
        train_split = load("digits").train
        shares = [train_split.share(worker, 3) for worker in range(3)]
        assert sum(len(share) for share in shares) == len(train_split)
        assert torch.equal(shares[1].images[0], train_split.images[1])

    def test_too_many_images_are_refused(self):
        with pytest.raises(RecipeError, match="--train-images is 1128; digits has 1127 besides the 225"):
            load("digits", None, 1128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar10"}, "--dataset is 'cifar10'; it must be one of mnist, fashion-mnist, digits"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"train_images": 0}, "--train-images is 0"),
        ({"learning_rate": math.nan}, "--lr is nan"),
        ({"learning_rate": 1e39}, "--lr is 1e\\+39"),
        ({"init": "zero"}, "--init is 'zero'"),
    ],
)
def test_settings_name_what_is_wrong(arguments, message):
    with pytest.raises(RecipeError, match=message):
        Settings(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"kind": "gzip"}, {"c": -1}, {"c": 0, "entropy_bits": 0}, {"c": 10, "entropy_bits": 7}]
)
def test_exchanges_that_make_no_sense_are_refused(arguments):
    with pytest.raises(RecipeError):
        Exchange(**arguments)


class TestLzw:
    @given(st.binary(max_size=2000) | st.text("ab", max_size=3000).map(str.encode))
    @settings(deadline=None)
    def test_round_trip(self, data):
        assert lzw.decompress(lzw.compress(data)) == data

    def test_round_trip_with_a_full_dictionary(self):
        data = torch.randint(0, 256, (200_000,), generator=generator(), dtype=torch.uint8).numpy().tobytes()
        compressed = lzw.compress(data)
        assert lzw.decompress(compressed) == data
        assert len(compressed) > len(data)

    def test_repetition_shrinks(self):
        assert len(lzw.compress(b"abc" * 10_000)) < 600

    @given(st.binary(max_size=200))
    @settings(deadline=None)
    def test_other_bytes_are_refused_or_decoded(self, data):
        try:
            lzw.decompress(data)
        except ValueError as error:
            assert "LZW" in str(error)  # noqa: PT017 - not every input is an error


def test_codecs_are_lossless_and_named():
    found = lossless.codecs()
    assert list(found)[:2] == ["LZW", "zlib"]
    data = initial("gaussian", generator())[1].weight.numpy().tobytes()
    for codec in found.values():
        assert codec.decompress(codec.compress(data)) == data
    assert found["zlib"].compress(data) == zlib.compress(data, 9)


def record(seed, accuracies, exchange=PAPER):
    history = {"validation_accuracy": accuracies, "test_accuracy": [a - 0.1 for a in accuracies]}
    return {"seed": seed, "init": "uniform", "exchange": vars(exchange), "history": history}


class TestEvaluation:
    def test_the_best_epoch_is_the_validation_splits_first(self):
        run = record(0, [0.5, 0.8, 0.7, 0.8])
        assert convergence_epoch(run) == 2
        assert best_accuracy(run) == pytest.approx(70.0)

    def test_epochs_to_a_level_are_counted_beside_the_baseline(self):
        baseline = [record(0, [0.5, 0.8]), record(1, [0.5, 0.6])]
        assert epochs_to_level(record(0, [0.7, 0.793, 0.9]), baseline) == 2
        assert epochs_to_level(record(1, [0.7, 0.793, 0.9]), baseline) == 1
        assert epochs_to_level(record(0, [0.7, 0.7]), baseline) == 3  # never

    def test_differences_are_of_equal_seeds(self):
        baseline = [record(seed, [0.5 + seed / 10]) for seed in (0, 1, 2)]
        runs = [record(seed, [0.51 + seed / 10]) for seed in (2, 1)]
        assert paired(runs, baseline, best_accuracy) == {"difference": 1.0, "half_interval": 0.0}
        assert paired(runs[:1], baseline, best_accuracy)["half_interval"] is None

    def test_interval_is_students(self):
        baseline = [record(seed, [0.5]) for seed in range(3)]
        runs = [record(seed, [0.5 + seed / 100]) for seed in range(3)]
        assert paired(runs, baseline, best_accuracy)["half_interval"] == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)

    def test_selection_is_by_exchange_and_initialisation(self):
        runs = [record(1, [0.5]), record(0, [0.5]), record(0, [0.5], Exchange())]
        assert [run["seed"] for run in select(runs, PAPER)] == [0, 1]
        assert select(runs, PAPER, "small") == []
        assert spread([3.0]) == {"mean": 3.0, "deviation": 0.0}
