"""DeepCluster: the images' features are clustered anew each epoch, and the network learns to name each image's cluster.

Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", 2018,
https://arxiv.org/abs/1807.05520.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslpre.errors import SslpreError
from sslpre.objective import Batch, Epoch, Loss, Objective, Picture, Setup
from sslpre.ops.kmeans import kmeans

ITERATIONS = 20  # of k-means, as in the authors' code
MEMBERS = 40  # images of a cluster on average, where the recipe leaves their number open
POINTS = 8  # images at least for each whitened direction: N points in N − 1 of them are all equally far apart
FLAT = 1e-6  # share of the largest variance below which a direction holds rounding alone
SEEN = 10_000  # images from one clustering to the next, where it is left open: a new classifier needs steps
BLOCK = 8192  # images whose features are looked at together
SHOWN = 8  # images of a cluster in a picture


class DeepCluster(Objective):
    """clusters: k, 0 for a fortieth of the images; components: of the PCA; sobel: the network sees edges, no colour;
    reassign: epochs from one clustering to the next, 0 for as many as 10,000 images take, and 1 at least.
    """

    assignments: Tensor  # [N], the cluster of each image
    weights: Tensor  # [K], of a cluster's images in the loss
    agreement: Tensor  # NMI between the last two assignments; −1 before there are two

    def __init__(
        self,
        setup: Setup,
        clusters: Annotated[int, Field(ge=0)] = 0,
        components: Annotated[int, Field(ge=1)] = 256,
        sobel: bool = False,
        reassign: Annotated[int, Field(ge=0)] = 1,
    ):
        super().__init__()
        self.reassign = reassign or max(1, SEEN // setup.images)
        self.anew = True  # whether the epoch began with new clusters
        self.clusters = clusters or min(setup.images, max(2, setup.images // MEMBERS))
        if clusters == 1:
            raise SslpreError("`1` cluster has nothing to tell apart", "--set method.clusters=0, one for 40 images")
        if self.clusters > setup.images:
            few = f"`{setup.images}` images cannot be in `{self.clusters}` clusters"
            raise SslpreError(few, "--set method.clusters=0, which is one for 40 images")
        self.encoder = setup.encoder("sobel" if sobel else "rgb")
        self.head = nn.Linear(self.encoder.dim, self.clusters)
        self.components = min(components, self.encoder.dim, max(1, setup.images // POINTS))
        self.register_buffer("assignments", torch.arange(setup.images) % self.clusters)
        self.register_buffer("weights", balanced(self.sizes.float()))
        self.register_buffer("agreement", torch.tensor(-1.0))

    @property
    def sizes(self) -> Tensor:
        """[K], how many images are in each cluster."""
        return self.assignments.bincount(minlength=self.clusters)

    def epoch_start(self, epoch: Epoch) -> list[nn.Module]:
        """Section 3.2: cluster the features, and begin with a new classifier, for clusters have no order."""
        self.anew = epoch.number % self.reassign == 0
        if not self.anew:
            return []
        features = epoch.every_image(self.features)
        if not features.isfinite().all():
            told = f"features not finite at the start of epoch {epoch.number + 1}"
            raise SslpreError(told, "lower --lr, or use --precision fp32", 10)
        labels = kmeans(whitened(features, self.components), self.clusters, iterations=ITERATIONS).labels
        if epoch.number:
            self.agreement.fill_(mutual_information(self.assignments, labels))
        self.assignments.copy_(labels)
        self.weights.copy_(balanced(self.sizes.to(self.weights)))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        return [self.head]

    def features(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def loss(self, batch: Batch) -> Loss:
        y = self.assignments[batch.index]
        logits = self.head(self.encoder(batch.views[0]))
        right = (logits.argmax(1) == y).float().mean()
        with torch.autocast(logits.device.type, enabled=False):  # the softmax in fp32 (fp64 stays fp64)
            each = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")
            return Loss((self.weights[y] * each).mean(), {"accuracy": right})  # equation 1; the weights of section 3.3

    def notes(self) -> dict[str, Any]:
        """Of an epoch that clusters. nmi: section 4.1, with the clusters before; clusters: with images; sizes: the
        number of clusters that have none, 1, 2–3, 4–7, 8–15, … images."""
        if not self.anew:
            return {}
        sizes = self.sizes.tolist()
        powers = [size.bit_length() for size in sizes]
        histogram = [powers.count(power) for power in range(max(powers) + 1)]
        told = {"clusters": len(sizes) - sizes.count(0), "sizes": histogram}
        return told if self.agreement < 0 else {"nmi": self.agreement.item(), **told}

    def pictures(self, batch: Batch) -> list[list[Picture]]:
        """A row for each cluster that the batch has images of, those with most images first."""
        rows: dict[int, list[Picture]] = {}
        for image, cluster in zip(batch.views[0], self.assignments[batch.index].tolist(), strict=True):
            rows.setdefault(cluster, []).append(Picture(f"cluster {cluster}", image))
        return [row[:SHOWN] for row in sorted(rows.values(), key=len, reverse=True)]

    @property
    def chance(self) -> float:
        """The least that one answer to all images can lose: every cluster that is used weighs the same."""
        return math.log(int(self.weights.count_nonzero()))


def balanced(sizes: Tensor) -> Tensor:
    """[K] weights of the clusters' images, of mean 1 over all images: as if clusters were drawn alike (section 3.3)."""
    share = sizes.sum() / sizes.count_nonzero()  # of each cluster that is used; an empty one has no images to weigh
    return torch.where(sizes > 0, share / sizes, 0.0)


def whitened(x: Tensor, components: int) -> Tensor:
    """Section 3.3: [N, D] → its first principal components [N, components] with variance 1, then rows of length 1."""
    mean = x.mean(0)
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # of fp32 sums the small variances are rounding
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=exact, device=x.device)
    for block in x.split(BLOCK):
        centred = (block - mean).to(exact)
        covariance += centred.T @ centred / len(x)
    values, vectors = torch.linalg.eigh(covariance.cpu())  # ascending
    values, vectors = values[-components:], vectors[:, -components:]
    scale = torch.where(values > FLAT * values[-1], values.clamp(min=1e-30).rsqrt(), 0.0)
    axes = (vectors * scale).to(x)
    return torch.cat([F.normalize((block - mean) @ axes, dim=1) for block in x.split(BLOCK)])


def mutual_information(a: Tensor, b: Tensor) -> float:
    """Normalised mutual information I(A; B) / √(H(A) H(B)) of two assignments [N] to clusters, in [0, 1]."""

    def entropy(labels: Tensor) -> float:
        p = labels.unique(return_counts=True)[1].cpu().double() / len(labels)
        return -(p * p.log()).sum().item()

    both = entropy(a * (int(b.max()) + 1) + b)
    h = entropy(a), entropy(b)
    if not h[0] * h[1]:
        return float(h[0] == h[1])  # of one cluster each: the same; of one against many: nothing is told
    return min(1.0, max(0.0, (h[0] + h[1] - both) / math.sqrt(h[0] * h[1])))
