"""Performer, scBERT and scFoundation in plain torch, padded or one cell at a time, with the published parameter names."""

import torch
from torch import nn
from torch.nn import functional as F


def favor(q, k, v, projection, *, per_cell):
    """FAVOR+ of one cell, (H, L, K): the published formula, or with our key maximum, a cell and head."""
    scale, n_features = q.shape[-1] ** -0.25, projection.shape[0]

    def features(x, is_query):
        projected = (x * scale) @ projection.T
        half = ((x * scale) ** 2).sum(-1, keepdim=True) / 2
        if is_query:
            top = projected.amax(-1, keepdim=True)
        else:
            top = projected.amax((-2, -1), keepdim=True) if per_cell else projected.amax()
        return n_features**-0.5 * (torch.exp(projected - half - top) + 1e-4)

    q_, k_ = features(q, True), features(k, False)
    return (q_ @ (k_.mT @ v)) / (q_ @ k_.sum(-2)[..., None])


class FastAttention(nn.Module):
    def __init__(self, n_features, head_width):
        super().__init__()
        self.register_buffer("projection_matrix", torch.randn(n_features, head_width))


class SelfAttention(nn.Module):
    per_cell = True

    def __init__(self, width, heads, head_width, n_features):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(width, heads * head_width, bias=False))
        self.to_out = nn.Linear(heads * head_width, width)
        self.fast_attention = FastAttention(n_features, head_width)

    def forward(self, x):
        q, k, v = (layer(x).view(len(x), self.heads, -1).transpose(0, 1) for layer in (self.to_q, self.to_k, self.to_v))
        out = favor(q, k, v, self.fast_attention.projection_matrix, per_cell=self.per_cell)
        return self.to_out(out.transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.w2(F.gelu(self.w1(x)))


class Chunk(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


class PreLayerNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class Sequence(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for attention, forward in self.layers:
            x = x + attention(x)
            x = x + forward(x)
        return x


class Performer(nn.Module):
    def __init__(self, width, depth, heads, head_width, n_features):
        super().__init__()
        self.net = Sequence(
            nn.ModuleList(
                [
                    PreLayerNorm(width, SelfAttention(width, heads, head_width, n_features)),
                    PreLayerNorm(width, Chunk(FeedForward(width))),
                ]
            )
            for _ in range(depth)
        )
        self.register_buffer("calls_since_last_redraw", torch.tensor(17))

    def forward(self, x):
        return self.net(x)


class Named(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class ScBert(nn.Module):
    """One cell at a time: buckets (L,) to logits over buckets (L, 7), or with `n_classes` to classes (C,)."""

    def __init__(self, n_positions, width=20, depth=3, heads=2, head_width=8, n_features=16, n_classes=0):
        super().__init__()
        self.token_emb = nn.Embedding(7, width)
        self.pos_emb = Named(emb=nn.Embedding(n_positions, width))
        self.performer = Performer(width, depth, heads, head_width, n_features)
        self.norm = nn.LayerNorm(width)
        if n_classes:
            self.to_out = Named(
                conv1=nn.Conv2d(1, 1, (1, width)),
                fc1=nn.Linear(n_positions, 512),
                fc2=nn.Linear(512, 128),
                fc3=nn.Linear(128, n_classes),
            )
        else:
            self.to_out = nn.Linear(width, 7)

    def states(self, buckets_L):
        return self.norm(self.performer(self.token_emb(buckets_L) + self.pos_emb.emb.weight))

    def forward(self, buckets_L):
        states_LD = self.states(buckets_L)
        if isinstance(self.to_out, nn.Linear):
            return self.to_out(states_LD)
        panel_L = F.relu(self.to_out.conv1(states_LD[None, None])).flatten()
        return self.to_out.fc3(F.relu(self.to_out.fc2(F.relu(self.to_out.fc1(panel_L)))))


class ScFoundation(nn.Module):
    """One cell at a time, with its decoder over the whole panel."""

    def __init__(
        self, n_positions, width=24, depth=2, heads=4, dec_width=20, dec_depth=2, dec_heads=2, head_width=8, bins=10
    ):
        super().__init__()
        self.token_emb = Named(
            mlp=nn.Linear(1, bins),
            mlp2=nn.Linear(bins, bins),
            emb=nn.Embedding(bins, width),
            emb_mask=nn.Embedding(1, width),
            emb_pad=nn.Embedding(1, width),
        )
        self.pos_emb = nn.Embedding(n_positions, width)
        layers = [nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True) for _ in range(depth)]
        self.encoder = Named(transformer_encoder=nn.ModuleList(layers), norm=nn.LayerNorm(width))
        self.decoder_embed = nn.Linear(width, dec_width)
        self.decoder = Named(
            performer=Performer(dec_width, dec_depth, dec_heads, head_width, 16), norm=nn.LayerNorm(dec_width)
        )
        self.norm = nn.LayerNorm(dec_width)
        self.to_final = nn.Linear(dec_width, 1)

    def value_embedding(self, values_L):
        h = F.leaky_relu(self.token_emb.mlp(values_L[:, None]), 0.1)
        weight = torch.softmax(h * 1.0 + self.token_emb.mlp2(h), -1)
        embedded = weight @ self.token_emb.emb.weight
        embedded[values_L == -1] = self.token_emb.emb_mask.weight[0]
        return embedded

    def encode(self, ids_L, values_L):
        x = (self.value_embedding(values_L) + self.pos_emb(ids_L))[None]
        for layer in self.encoder.transformer_encoder:
            x = layer(x)
        return self.encoder.norm(x)[0]

    def forward(self, ids_L, values_L):
        """Gene states (L, E) of the decoder; `to_final` of them are the values."""
        x = self.value_embedding(values_L)
        seen_L = values_L > 0
        x[seen_L] = self.encode(ids_L[seen_L], values_L[seen_L])
        x = self.decoder_embed(x + self.pos_emb(ids_L))
        return self.norm(self.decoder.norm(self.decoder.performer(x)))
