"""Gradient caching: the gradient of the whole batch, chunk by chunk."""

import copy

import pytest
import torch
from torch import nn

from training.gradient_cache import backward_in_chunks
from training.losses import SupConLoss
from training.network import Network
from training.objectives import build_objective


class Ghost(nn.Module):
    """BatchNorm over chunks of four rows, as chunked passes of twelve have it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, rows):
        return torch.cat([self.norm(part) for part in rows.split(4)])


def network(encoder, head=None):
    return Network(encoder, head, build_objective("supcon")).double()


def gradients(module):
    return [parameter.grad for parameter in module.parameters()]


def cached(net, views, labels, chunk):
    return backward_in_chunks(
        net,
        project=net.project,
        loss_of=lambda z: net.objective(z, labels, n_views=2),
        views=views,
        chunk=chunk,
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 3, 2, 2, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2] * 2)


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 100])
def test_chunks_of_any_size_give_the_gradient_of_the_whole_batch(batch, chunk):
    views, labels = batch
    torch.manual_seed(0)
    net = network(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))
    whole = copy.deepcopy(net)
    loss = whole(views, labels, n_views=2)
    loss.backward()
    torch.testing.assert_close(cached(net, views, labels, chunk), loss.detach())
    torch.testing.assert_close(gradients(net), gradients(whole))


def test_batchnorm_takes_each_chunks_statistics_and_counts_a_chunk_once(batch):
    views, labels = batch
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)]
    net = network(nn.Sequential(*layers))
    whole = copy.deepcopy(net)
    whole.encoder[2] = Ghost(whole.encoder[2])
    loss = whole(views, labels, n_views=2)
    loss.backward()
    torch.testing.assert_close(cached(net, views, labels, 4), loss.detach())
    torch.testing.assert_close(gradients(net), gradients(whole))
    norm, ghost = net.encoder[2], whole.encoder[2].norm
    assert norm.num_batches_tracked == ghost.num_batches_tracked == 3
    torch.testing.assert_close(norm.running_mean, ghost.running_mean)
    torch.testing.assert_close(norm.running_var, ghost.running_var)


def test_dropout_drops_the_same_in_both_passes(batch):
    views, labels = batch
    torch.manual_seed(0)
    net = network(nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.Dropout(0.5), nn.Linear(64, 5)))
    whole = copy.deepcopy(net)
    torch.manual_seed(7)
    # The whole batch as chunks see it: the rows of each chunk drawn together.
    z = torch.cat([whole.project(part) for part in views.split(4)])
    loss = SupConLoss()(z, labels)
    loss.backward()
    torch.manual_seed(7)
    torch.testing.assert_close(cached(net, views, labels, 4), loss.detach())
    torch.testing.assert_close(gradients(net), gradients(whole))
