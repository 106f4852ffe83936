"""Faults to put into the package on purpose, one at a time: each names a line of the
source, what stands in its place, and what that makes wrong.

The line must occur exactly once in its file (tests/faults/test_faults.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One wrong line."""

    file: str
    old: str
    new: str
    says: str

    @property
    def name(self) -> str:
        """How the report and the command line call it."""
        return f"{self.file}: {self.says}"

    def break_source(self, source: str) -> str:
        """The source with the fault in it.

        Raises
        ------
        ValueError
            If the line is not there exactly once.
        """
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its line is there {count} times, not once")
        return source.replace(self.old, self.new)


def faults(file: str, *changes: tuple[str, str, str]) -> list[Fault]:
    """Several faults of one file."""
    return [Fault(file, *change) for change in changes]


FAULTS = [
    *faults(
        "theory/mixture.py",
        (
            "    return float(norms[off_diagonal].max())",
            "    return float(norms[off_diagonal].min())",
            "coherence is the smallest cosine",
        ),
        (
            "            torch.randn(n, self.rank, **options) * self.scales[labels]",
            "            torch.randn(n, self.rank, **options)",
            "the signal's scale left out of the samples",
        ),
        (
            "tokens=clean + sigma * noise, clean=clean",
            "tokens=clean + sigma**2 * noise, clean=clean",
            "variance for the standard deviation of the samples' noise",
        ),
        (
            "        spectrum = self.scales**2 + variance  # (..., K, p)",
            "        spectrum = self.scales + variance  # (..., K, p)",
            "scale for its square in the density",
        ),
        (
            "spectrum.log().sum(-1) + (self.dim - self.rank) * variance[..., 0].log()",
            "spectrum.log().sum(-1) + self.dim * variance[..., 0].log()",
            "noise counted in d dimensions in the determinant",
        ),
        (
            "        return self.weights.log() - 0.5 * (",
            "        return -0.5 * (",
            "mixture weights left out of the posterior",
        ),
        (
            "            coordinates / (self.scales**2 + variance),",
            "            coordinates / variance,",
            "the score does not know the signal's variance",
        ),
        (
            "        return -(inside + outside)",
            "        return inside + outside",
            "sign of the score",
        ),
        (
            "        return -(inside + outside)",
            "        return -outside",
            "the score acts outside the subspaces only",
        ),
        (
            "        shrinkage = self.scales**2 / (self.scales**2 + variance)",
            "        shrinkage = torch.ones_like(self.scales + variance)",
            "the posterior mean does not shrink",
        ),
    ),
    *faults(
        "theory/denoise.py",
        (
            "    return z + variance * score",
            "    return z - variance * score",
            "sign in Tweedie's formula",
        ),
        (
            "dtype=z.dtype, device=z.device)[..., None] ** 2",
            "dtype=z.dtype, device=z.device)[..., None]",
            "sigma for its square in Tweedie's formula",
        ),
        (
            "    return (nearest @ (nearest.mT @ z[..., None]))[..., 0]",
            "    return z",
            "projection on the nearest subspace is the identity",
        ),
        (
            ".square().sum(-1).argmax(-1)",
            ".square().sum(-1).argmin(-1)",
            "the farthest subspace for the nearest",
        ),
        (
            "    return float((estimate - clean).square().sum()) / before",
            "    return (float((estimate - clean).square().sum()) / before) ** 0.5",
            "noise left as a root",
        ),
    ),
    *faults(
        "theory/em.py",
        (
            "    scales = (kept - sigma**2).clamp_min(0).sqrt()",
            "    scales = kept.clamp_min(0).sqrt()",
            "noise stays in the fitted scales",
        ),
        (
            "        responsibilities = torch.softmax(log_joint, -1)",
            "        responsibilities = torch.softmax(log_joint, 0)",
            "responsibilities normalised over tokens",
        ),
        (
            "vectors[:, :, -rank:].contiguous()",
            "vectors[:, :, :rank].contiguous()",
            "the smallest directions fitted",
        ),
    ),
    *faults(
        "theory/rate.py",
        (
            "    return rank / (n * eps**2)",
            "    return rank / (n * eps)",
            "eps for its square in beta",
        ),
        (
            "    return rank / (n * eps**2)",
            "    return (rank / (n * eps**2)) ** 0.5",
            "the root of beta for beta",
        ),
        (
            "    return rank / (n * eps**2)",
            "    return rank / eps**2",
            "beta without the number of tokens",
        ),
        (
            "    return _half_log_det(_at_least_single(z), d / (n * eps**2))",
            "    return _half_log_det(_at_least_single(z), 1 / (n * eps**2))",
            "the rate without d",
        ),
        (
            "    return (alpha * _shrink(_at_least_single(z), alpha)).to(z.dtype)",
            "    return _shrink(_at_least_single(z), alpha).to(z.dtype)",
            "the rate's gradient without its factor",
        ),
        (
            "    return (beta * (_shrink(v, beta) @ bases.mT).sum(-3)).to(z.dtype)",
            "    return ((_shrink(v, beta) @ bases.mT).sum(-3)).to(z.dtype)",
            "the subspace rate's gradient without beta",
        ),
        (
            "    return (beta * (_shrink(v, beta) @ bases.mT).sum(-3)).to(z.dtype)",
            "    return -(beta * (_shrink(v, beta) @ bases.mT).sum(-3)).to(z.dtype)",
            "sign of the subspace rate's gradient",
        ),
        (
            "    return (beta * (_shrink(v, beta) @ bases.mT).sum(-3)).to(z.dtype)",
            "    return (beta * (v @ bases.mT).sum(-3)).to(z.dtype)",
            "the subspace rate's gradient without the inverse",
        ),
        (
            ".abs().log().sum(-1).to(v.dtype)",
            ".abs().log().sum(-1).mul(2).to(v.dtype)",
            "half of the log determinant left out",
        ),
        (
            "        [m.shape[-2] / z.shape[-2] * coding_rate(m, eps) for m in "
            "members]",
            "        [coding_rate(m, eps) for m in members]",
            "classes not weighted by their size",
        ),
        (
            "    return coding_rate(z, eps) - subspace_coding_rate(z, bases, eps)",
            "    return subspace_coding_rate(z, bases, eps) - coding_rate(z, eps)",
            "rate reduction with its sign changed",
        ),
        (
            "    return rate_reduction(z, bases, eps) - lambd * nonzeros",
            "    return rate_reduction(z, bases, eps)",
            "sparsity left out of the objective",
        ),
    ),
    *faults(
        "theory/law.py",
        (
            "v.masked_fill(own[..., None], 0.0) @ bases.mT).sum(-3)",
            "v.masked_fill(~own[..., None], 0.0) @ bases.mT).sum(-3)",
            "noise in the own subspace for noise in the others",
        ),
        (
            "    return (gradient / beta - target).norm(dim=-1) / target.norm(dim=-1)",
            "    return (gradient - target).norm(dim=-1) / target.norm(dim=-1)",
            "the gradient compared without dividing by beta",
        ),
        (
            "    return torch.hypot((1 + mistaken) * own, occupied + mistaken)",
            "    return torch.hypot(own, occupied + mistaken)",
            "the bound without the noise that leaks",
        ),
        (
            "    g2 = sigma**2 * rank",
            "    g2 = sigma**2",
            "the law's noise without the rank",
        ),
        (
            "    other_g2 = (components - 1) * g2",
            "    other_g2 = components * g2",
            "the own subspace counted among the others",
        ),
        (
            "    high, low = 1 / (1 + smallest), 1 / (1 + largest)",
            "    high, low = 1 / (1 + largest), 1 / (1 + largest)",
            "one end of the contraction taken twice",
        ),
    ),
    *faults(
        "theory/integrators.py",
        (
            "    return z + h / 2 * (first + field(t + h, z + h * first))",
            "    return z + h * first",
            "Euler for Heun",
        ),
        (
            "    k3 = field(t + h / 2, z + h / 2 * k2)",
            "    k3 = field(t + h / 2, z + h * k2)",
            "a full step inside Runge-Kutta",
        ),
        (
            "    return z + h * field(t, z)",
            "    return z",
            "Euler's step is the identity",
        ),
    ),
    *faults(
        "theory/diffusion.py",
        (
            "    return lambda sigma, z: -sigma * mixture.score(z, sigma)",
            "    return lambda sigma, z: sigma * mixture.score(z, sigma)",
            "sign of the probability flow",
        ),
        (
            "    return lambda sigma, z: -sigma * mixture.score(z, sigma)",
            "    return lambda sigma, z: -mixture.score(z, sigma)",
            "the probability flow without sigma",
        ),
        (
            "        removed = high**2 - low**2",
            "        removed = (high - low) ** 2",
            "levels subtracted before they are squared",
        ),
        (
            "        z = z + removed * mixture.score(z, high) + (low / high) * "
            "math.sqrt(removed) * w",
            "        z = z + removed * mixture.score(z, high)",
            "the reverse SDE without noise",
        ),
        (
            "    scale = increments.sqrt().reshape(-1, *[1] * x.ndim)",
            "    scale = increments.reshape(-1, *[1] * x.ndim)",
            "variance for the standard deviation of the forward noise",
        ),
        (
            "    return lambda _t, z: -subspace_coding_rate_grad(z, bases, eps)",
            "    return lambda _t, z: subspace_coding_rate_grad(z, bases, eps)",
            "the structured flow goes up",
        ),
        (
            "    exponent = math.log(beta) + 2 * start.log() + energy - 2 * "
            "beta * time",
            "    exponent = math.log(beta) + 2 * start.log() + energy - beta * time",
            "half the time in the exact flow",
        ),
        (
            "    return end / singular * (1 + beta * singular**2) / (1 + beta "
            "* end**2)",
            "    return end / singular",
            "the flow's derivative without its second factor",
        ),
        (
            "((moved - coordinates) @ frames.mT).sum(-3)",
            "(moved @ frames.mT).sum(-3)",
            "the exact flow adds the moved part to the old one",
        ),
        (
            "            z = target + kappa * subspace_coding_rate_grad(z, bases, eps)",
            "            z = target + kappa * "
            "subspace_coding_rate_grad(target, bases, eps)",
            "the inverse of a step is an explicit step back",
        ),
    ),
    *faults(
        "model/attention.py",
        (
            "    return torch.softmax(scale * (v @ v.mT), dim=-1)",
            "    return torch.softmax(scale * (v @ v.mT), dim=-2)",
            "softmax over the wrong axis in the weights",
        ),
        (
            "    return F.scaled_dot_product_attention(flat, flat, averaged, "
            "scale=scale)"
            ".reshape(",
            "    return F.scaled_dot_product_attention(flat, flat, averaged).reshape(",
            "the softmax's scale ignored",
        ),
        (
            "    return beta * (attend(v, scale) @ bases.mT).sum(-3)",
            "    return (attend(v, scale) @ bases.mT).sum(-3)",
            "attention without beta",
        ),
        (
            "    return beta * (v @ bases.mT).sum(-3) - subspace_coding_rate_grad("
            "z, bases, eps)",
            "    return beta * (v @ bases.mT).sum(-3) + subspace_coding_rate_grad("
            "z, bases, eps)",
            "sign in the exact operator",
        ),
        (
            "    return (1 - kappa * beta) * z + kappa * attended",
            "    return z + kappa * attended",
            "the step does not let go of the old tokens",
        ),
        (
            "    return (1 - kappa * beta) * z + kappa * attended",
            "    return z",
            "the attention step is the identity",
        ),
        (
            "        self.scale = 1.0 / math.sqrt(dim // heads)",
            "        self.scale = 1.0 / math.sqrt(dim)",
            "the layer's scale from the whole dimension",
        ),
        (
            "        return self.project.weight.unflatten(0, (self.heads, -1)).mT",
            "        return self.project.weight.mT.unflatten(0, (self.heads, -1)).mT",
            "bases read from the transposed weight",
        ),
        (
            "        return self.output(attended.transpose(-3, -2).flatten(-2))",
            "        return attended.transpose(-3, -2).flatten(-2)",
            "the output map left out",
        ),
    ),
    *faults(
        "model/kernels.py",
        (
            "        matrix = eta * (dictionary - gram)",
            "        matrix = eta * (dictionary + gram)",
            "sign of the Gram matrix in ISTA",
        ),
        (
            "        symmetric = (gradient + gradient.mT).to(ctx.product_dtype)",
            "        symmetric = (2 * gradient).to(ctx.product_dtype)",
            "the dictionary's gradient without its transposed part",
        ),
    ),
    *faults(
        "model/sparsify.py",
        (
            "    return (z @ ista_matrix(dictionary, eta)).sub_(eta * lambd).relu_()",
            "    return (z @ ista_matrix(dictionary, eta)).relu_()",
            "the threshold left out",
        ),
        (
            "    return (z @ ista_matrix(dictionary, eta)).sub_(eta * lambd).relu_()",
            "    return (z @ ista_matrix(dictionary, eta)).sub_(lambd).relu_()",
            "the threshold without the step size",
        ),
        (
            "    return (z @ ista_matrix(dictionary, eta)).sub_(eta * lambd).relu_()",
            "    return (z @ ista_matrix(dictionary.mT, eta)).sub_(eta * "
            "lambd).relu_()",
            "the dictionary transposed",
        ),
        (
            "    return (z @ ista_matrix(dictionary, eta)).sub_(eta * lambd).relu_()",
            "    return F.relu(z)",
            "the ISTA step is a ReLU",
        ),
        (
            "    return F.relu(codes + eta * (residual @ dictionary) - eta * lambd)",
            "    return codes + eta * (residual @ dictionary) - eta * lambd",
            "codes may be negative",
        ),
        (
            "    value = 0.5 * residual.square().sum((-2, -1)) + lambd * "
            "codes.sum((-2, -1))",
            "    value = residual.square().sum((-2, -1)) + lambd * codes.sum((-2, -1))",
            "half of the fit left out of the objective",
        ),
        (
            "        return z + self.codes(z) @ self.decode.mT",
            "        return self.codes(z) @ self.decode.mT",
            "the overcomplete step without its skip connection",
        ),
    ),
    *faults(
        "model/layers.py",
        (
            "        return x + self.drop_path(self.attention(self.norm_attention(x)))",
            "        return self.drop_path(self.attention(self.norm_attention(x)))",
            "compression without its skip connection",
        ),
        (
            "        return self.sparsify(self.norm_sparsify(self.compress(x)))",
            "        return self.sparsify(self.compress(x))",
            "the second norm left out",
        ),
        (
            "        return v - self.attention(self.norm_attention(v))",
            "        return v + self.attention(self.norm_attention(v))",
            "the decoder compresses",
        ),
    ),
    *faults(
        "model/patches.py",
        (
            '"b c (h p) (w q) -> b (h w) (p q c)"',
            '"b c (h p) (w q) -> b (h w) (q p c)"',
            "patches transposed",
        ),
        (
            "    return NormalizedPatches((patches - mean) / std, mean, std)",
            "    return NormalizedPatches(patches / std, mean, std)",
            "targets keep their mean",
        ),
        (
            "    table = torch.cat([along_x, along_y], dim=-1)",
            "    table = torch.cat([along_y, along_x], dim=-1)",
            "rows and columns exchanged in the positions",
        ),
        (
            "(ids_restore >= visible).to(noise.dtype)",
            "(ids_restore < visible).to(noise.dtype)",
            "the mask marks the visible patches",
        ),
    ),
    *faults(
        "model/autoencoder.py",
        (
            "            loss=(error * mask).sum() / mask.sum(),",
            "            loss=error.mean(),",
            "the loss counts visible patches",
        ),
        (
            "                mask[..., None] > 0, "
            "self.mask_token.to(embedded.dtype), embedded",
            "                mask[..., None] > 2, "
            "self.mask_token.to(embedded.dtype), embedded",
            "nothing is hidden from the encoder",
        ),
        (
            "            x = self.with_class_token(filled) + positions",
            "            x = self.with_class_token(filled)",
            "positions left out",
        ),
    ),
    *faults(
        "model/fold.py",
        (
            "                        (config.dim,), -config.eta * config.lambd",
            "                        (config.dim,), config.eta * config.lambd",
            "sign of the folded threshold",
        ),
        (
            "        weight = weight * gain",
            "        weight = weight",
            "the norm's gain lost in folding",
        ),
    ),
    *faults(
        "model/reference.py",
        (
            'weights["patch_embedding.weight"] = tensor.permute(0, 2, 3, 1).flatten(1)',
            'weights["patch_embedding.weight"] = tensor.flatten(1)',
            "the authors' kernel flattened in their order",
        ),
    ),
    *faults(
        "model/vit.py",
        (
            "        return torch.softmax(attention.scale * (queries @ "
            "keys.mT), dim=-1)",
            "        return torch.softmax(queries @ keys.mT, dim=-1)",
            "the ViT's weights without their scale",
        ),
    ),
]
