"""A hybrid Mixture-of-Experts decoder for transformers, written by `hymoe export --with-code`.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

config.json holds hymoe's own config under "model"; the names of its settings are those used here. What the model
computes is what hymoe computes in evaluation: nothing is dropped, jittered or sampled, there are no auxiliary losses.
Weights come from a checkpoint; a model made of a config alone has none to speak of.

Texts are flattened: the rows [T, D] of all documents lie one after another, a row of the batch being a document, its
padding (attention_mask 0) taken out. Attention and routing never cross from one document to the next, but for expert
choice, which looks at the whole call.

There is NO CACHE: generate() computes the whole text again at every step. It refuses routers that look ahead, which
would then decide again what they had decided.
"""

import json
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class HymoeConfig(PreTrainedConfig):
    model_type = "hymoe"

    def __init__(self, model=None, **kwargs):
        super().__init__(**kwargs)
        self.model = model or {}
        if not model:
            return
        self.vocab_size = model["vocab_size"]
        self.hidden_size = model["dim"]
        self.num_hidden_layers = model["num_layers"]
        self.num_attention_heads = model["num_heads"]
        self.num_key_value_heads = model["num_kv_heads"]
        self.max_position_embeddings = model["max_seq_len"]
        self.tie_word_embeddings = model["tie_embeddings"]
        self.bos_token_id = model["bos_token_id"] if model["bos_token_id"] >= 0 else None
        self.eos_token_id = model["eos_token_ids"] or None


def wide(x):
    """What norms, routing and sums are computed in: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def best(scores, k):
    """The columns of the k largest of each row, best first; of equal ones the lower first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


class Rows:
    """The documents of a call: rows of each, the place of every row in its own, and what rotary embedding turns by."""

    def __init__(self, lengths, config, device):
        self.lengths = lengths
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        self.cos = self.sin = None
        if config.positions == "rotary":
            parts = [torch.arange(n, device=device)[:, None].float() * rotary_angles(config, n, device) for n in lengths]
            angles = torch.cat(parts)
            scale = torch.cat([torch.full((n, 1, 1), float(rotary_scale(config, n)), device=device) for n in lengths])
            self.cos, self.sin = angles.cos()[:, None] * scale, angles.sin()[:, None] * scale


def head_size(config):
    return config.head_dim or config.dim // config.num_heads


def longrope(config, length):
    """The factors of the angles and that of what rotates: those for long texts or those for short ones."""
    rope = config.rope
    if length > rope.original_seq_len:
        return rope.long_factors, rope.long_scale
    return rope.short_factors, rope.short_scale


def rotary_angles(config, length, device):
    """Angle a position of every pair of channels that rotates, in a text of `length`."""
    size, rope = config.rotary_dim or head_size(config), config.rope
    angles = 1 / config.rope_theta ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    if rope.scaling == "linear":
        return angles / rope.factor
    if rope.scaling == "llama3":  # waves of few turns in the original length become longer, those of many stay
        turns = rope.original_seq_len * angles / (2 * math.pi)
        stays = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - stays) * angles / rope.factor + stays * angles
    if rope.scaling == "yarn":  # the same by numbers of pairs of channels
        ends = [
            size * math.log(rope.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        ]
        if rope.truncate:
            ends = math.floor(ends[0]), math.ceil(ends[1])
        first, last = max(ends[0], 0), min(ends[1], size - 1)
        longer = (torch.arange(size // 2, device=device) - first) / (last - first if last != first else 0.001)
        longer = longer.clamp(0, 1)
        return longer * angles / rope.factor + (1 - longer) * angles
    if rope.scaling == "longrope":
        return angles / torch.tensor(longrope(config, length)[0], device=device)
    return angles


def rotary_scale(config, length):
    """The factor of what rotates."""
    rope = config.rope
    if rope.scaling == "longrope":
        return longrope(config, length)[1]
    if rope.scaling != "yarn":
        return 1
    return 1 + 0.1 * math.log(max(rope.factor, 1)) if rope.attention_factor is None else rope.attention_factor


class Norm(nn.Module):
    def __init__(self, size, eps, layer=False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if layer else None

    def forward(self, x):
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        h = wide(x)
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.size = head_size(config)
        self.norm_of_heads = config.qk_norm == "head"
        self.window = 0 if layer in config.full_attention_layers else config.sliding_window
        self.clip = config.clip_qkv
        bias = config.family == "qwen2" if config.qkv_bias is None else config.qkv_bias
        queries, keys = config.num_heads * self.size, config.num_kv_heads * self.size
        self.q_proj = nn.Linear(config.dim, queries, bias=bias)
        self.k_proj = nn.Linear(config.dim, keys, bias=bias)
        self.v_proj = nn.Linear(config.dim, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.dim, bias=config.o_bias)
        self.query_positions = self.q_norm = self.k_norm = None
        if config.top_query and layer == config.num_layers - 1:
            self.query_positions = nn.Embedding(config.max_seq_len, config.dim)
        if config.qk_norm != "none":
            self.q_norm = Norm(self.size if self.norm_of_heads else queries, config.norm_eps)
            self.k_norm = Norm(self.size if self.norm_of_heads else keys, config.norm_eps)

    def heads(self, x, norm=None):
        if norm is not None and not self.norm_of_heads:
            x = norm(x)
        x = x.view(x.shape[0], -1, self.size)
        if norm is not None and self.norm_of_heads:
            x = norm(x)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def turned(self, x, rows):
        """Channel i of those that rotate turns against channel i + half of them."""
        if rows.cos is None:
            return x
        half = rows.cos.shape[-1]
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        cos, sin = rows.cos, rows.sin
        return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)

    def forward(self, x, rows):
        asking = x if self.query_positions is None else self.query_positions(rows.positions)
        q = self.turned(self.heads(self.q_proj(asking), self.q_norm), rows)
        k = self.turned(self.heads(self.k_proj(x), self.k_norm), rows)
        v = self.heads(self.v_proj(x))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        parts = [self.attend(*of) for of in zip(*(t.split(rows.lengths) for t in (q, k, v)))]
        return self.o_proj(torch.cat(parts).flatten(1))

    def attend(self, q, k, v):
        """One document, [S, heads, d]."""
        row = torch.arange(q.shape[0], device=q.device)
        age = row[:, None] - row
        seen = (age >= 0) & (age < self.window) if self.window > 0 else age >= 0
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)


class Mlp(nn.Module):
    def __init__(self, dim, hidden, kind="swiglu", bias=False):
        super().__init__()
        self.kind = kind
        if kind == "swiglu":
            self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        if self.kind == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        up = self.up_proj(x)
        if self.kind == "quick_gelu":
            return self.down_proj(up * torch.sigmoid(1.702 * up))
        return self.down_proj(F.gelu(up, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Router(nn.Module):
    """Gives each row its weights of the experts [T, E], 0 for those that it does not visit, and that of the shared
    expert [T], or None where it takes no part."""

    causal = True

    def __init__(self, config, num_experts, dim, rows=0):
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.zeros(rows or num_experts, dim))

    def logits(self, x):
        return F.linear(wide(x), wide(self.weight))


class TopkRouter(Router):
    def __init__(self, config, num_experts, dim):
        # A shared expert inside has the last row.
        super().__init__(config, num_experts, dim, num_experts + (config.shared == "inside"))
        self.normalize = config.normalize is not False
        if config.bias_update is not None:
            self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x, rows):
        c, logits = self.config, self.logits(x)
        scores = logits.sigmoid() if c.scoring == "sigmoid" else logits.softmax(1)
        choice = scores[:, : self.num_experts]
        if c.bias_update is not None:
            choice = choice + self.bias
        if c.num_groups > 1:  # only experts of the best groups
            groups = choice.unflatten(1, (c.num_groups, -1))
            kept = best(groups.topk(c.group_top_k).values.sum(-1), c.top_groups)
            other = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, kept, False)
            choice = groups.masked_fill(other[..., None], -math.inf).flatten(1)
        taken = ids = best(choice, c.top_k)
        if c.shared == "inside":
            taken = torch.cat([ids, torch.full_like(ids[:, :1], self.num_experts)], 1)
        weights = scores.gather(1, taken)
        if self.normalize:  # scoring softmax_topk, a softmax over the chosen logits, is a softmax normalised over them
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-20)
        weights = torch.zeros_like(scores).scatter(1, taken, weights * c.scale)
        return weights[:, : self.num_experts], weights[:, self.num_experts] if c.shared == "inside" else None


class SparseMixerRouter(Router):
    """SparseMixer-v2: rounds, in each of which the largest logit left wins, weighed among those that lie near it."""

    def forward(self, x, rows):
        c, logits = self.config, self.logits(x)
        if c.mixer_variant == "v2_star":
            logits = logits / 2
        weights, taken = torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool)
        for _ in range(c.top_k):
            largest = logits.masked_fill(taken, -math.inf).amax(1, keepdim=True)
            far = (largest - logits) / torch.maximum(logits.abs(), largest) > 2 * c.mixer_eps
            p = logits.masked_fill(far | taken, -math.inf).softmax(1)
            winner = best(p, 1)
            weights = weights.scatter(1, winner, p.gather(1, winner))
            taken = taken.scatter(1, winner, True)
        return weights, None


class SegmentRouter(Router):
    """Windows of consecutive rows of a document go together. The kinds expert_choice and threshold are the same for
    windows of one row, which score themselves."""

    def __init__(self, config, num_experts, dim):
        super().__init__(config, num_experts, dim)
        by_rows = config.kind != "segment"
        self.select = config.kind if by_rows else config.select
        self.score = "own" if by_rows else config.score
        self.length = 1 if by_rows else config.segment_len
        self.causal = self.select != "expert_choice" and (self.score != "own" or self.length == 1)
        if self.score in ("previous", "prefix"):
            self.start = nn.Parameter(torch.zeros(dim))
        if self.select == "threshold":
            self.register_buffer("cutoff", torch.full((num_experts,), math.inf))
            self.register_buffer("cutoff_steps", torch.zeros((), dtype=torch.int64))
        if self.select == "predictor":
            self.predictor = nn.Linear(dim, num_experts)

    def forward(self, x, rows):
        c, length = self.config, 1 if self.score == "sliding" else self.length
        cut = [[length] * (n // length) + ([n % length] if n % length else []) for n in rows.lengths]
        counts, sizes = [len(sizes) for sizes in cut], torch.tensor(sum(cut, []), device=x.device)
        scoring = self.scoring(x, rows.lengths, counts, sizes)
        logits = self.logits(scoring)
        scores = logits.sigmoid() if c.scoring == "sigmoid" else logits.softmax(1)
        none = torch.zeros_like(scores, dtype=torch.bool)
        if self.select == "top_k":
            taken = none.scatter(1, best(scores, c.top_k), True)
        else:
            who = self.taken(logits, scores, scoring, counts, sizes)
            most = best(scores.masked_fill(~who, -math.inf), min(c.bucket, self.num_experts))
            taken = who & none.scatter(1, most, True)
        weights = scores * taken
        if c.normalize:
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-20)
        if c.gate_scale == "window":
            weights = weights / self.length
        return weights.repeat_interleave(sizes, 0), None

    def pool(self, x, sizes):
        """Windows as vectors [U, D]."""
        unit = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes)
        pooled = wide(x).new_zeros(len(sizes), x.shape[1])
        if self.config.pooling == "max":
            index = unit[:, None].expand_as(x)
            pooled = pooled.scatter_reduce(0, index, wide(x), "amax", include_self=False)
        else:
            pooled = pooled.index_add(0, unit, wide(x)) / sizes[:, None]
        return wide(pooled.to(x.dtype))

    def scoring(self, x, lengths, counts, sizes):
        """What scores each window [U, D]."""
        if self.score == "sliding":
            return torch.cat([self.slide(wide(document)) for document in x.split(lengths)])
        pooled = self.pool(x, sizes)
        if self.score == "own":
            return pooled
        scoring = []
        for document, windows in zip(x.split(lengths), pooled.split(counts)):
            first = self.start + document[0] if self.config.first_row else self.start
            scoring += [wide(first)[None], self.before(windows)]
        return torch.cat(scoring)

    def slide(self, x):
        """Each row of a document by the `length` rows up to it."""
        largest = self.config.pooling == "max"
        past = F.pad(x, (0, 0, self.length - 1, 0), value=-math.inf if largest else 0).unfold(0, self.length, 1)
        if largest:
            return past.amax(-1)
        return past.sum(-1) / torch.arange(1, len(x) + 1, device=x.device).clamp_max(self.length)[:, None]

    def before(self, windows):
        """What scores each window of a document but the first."""
        decay = self.config.prefix_decay
        if self.score == "previous":
            return windows[:-1]
        if decay == 0:
            return windows[:-1].cumsum(0) / torch.arange(1, len(windows), device=windows.device)[:, None]
        averages = [windows[0]]
        for window in windows[1:-1]:
            averages.append(decay * averages[-1] + (1 - decay) * window)
        return torch.stack(averages)[: len(windows) - 1]

    def taken(self, logits, scores, scoring, counts, sizes):
        """[U, E] bool: which expert takes which window, not yet more than `bucket` a window."""
        if self.select == "threshold":  # a cut-off on the logit of equal windows is reached, whatever rounding did
            return logits + (logits.abs() + 1) * 1e-5 >= self.cutoff
        if self.select == "predictor":
            return F.linear(scoring, wide(self.predictor.weight), wide(self.predictor.bias)) > 0
        if self.select == "prefix_choice":
            return torch.cat([self.prefix_choice(windows) for windows in logits.split(counts)])
        weighed = sizes if self.config.capacity_unit == "rows" else torch.ones_like(sizes)
        pools = counts if self.config.choice_pool == "sequence" else [len(sizes)]
        return torch.cat([self.expert_choice(*pool) for pool in zip(scores.split(pools), weighed.split(pools))])

    def expert_choice(self, scores, sizes):
        """Experts in order take the best of windows that fewer than `bucket` have, up to their capacity."""
        limit = float(sizes.sum()) * self.config.capacity // self.num_experts
        times, columns = torch.zeros_like(sizes), []
        for column in scores.unbind(1):
            order = column.argsort(descending=True, stable=True)
            free = times[order] < self.config.bucket
            fits = free & ((sizes[order] * free).cumsum(0) <= limit)
            columns.append(torch.zeros_like(fits).scatter(0, order, fits))
            times = times + columns[-1]
        return torch.stack(columns, 1)

    def prefix_choice(self, logits):
        """The windows of a document, each by its rank among those before it. What capacity leaves as a fraction goes,
        whenever fractions have added up to one, to the best of the experts that have one left."""
        rank = torch.stack([(v > v[:, None]).tril(-1).sum(1) for v in logits.unbind(1)], 1)
        windows = torch.arange(1, len(logits) + 1, device=logits.device)
        share = windows.double()[:, None] * self.config.capacity / self.num_experts
        whole = share.floor()
        partly = rank == whole
        due = ((partly.sum(1, keepdim=True) * (share - whole)).cumsum(0) + (0.5 + 1e-9)).floor()
        now = due.diff(dim=0, prepend=torch.zeros_like(due[:1]))
        order = best(logits.masked_fill(~partly, -math.inf), self.num_experts)
        place = order.argsort(dim=1)
        return (rank < whole) | (partly & (place < now))


ROUTERS = {
    "topk": TopkRouter,
    "sparse_mixer": SparseMixerRouter,
    "segment": SegmentRouter,
    "expert_choice": SegmentRouter,
    "threshold": SegmentRouter,
}


class Experts(nn.Module):
    """SwiGLU networks in stacked weights, gate rows before up rows."""

    def __init__(self, num_experts, dim, hidden):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, dim, hidden))

    def forward(self, x, weights):
        """Σ_e weights[t, e] · expert e of x[t], in the type of weights."""
        y = torch.zeros_like(x, dtype=weights.dtype)
        for e in range(weights.shape[1]):
            rows = weights[:, e].nonzero()[:, 0]
            gate, up = F.linear(x[rows], self.gate_up_proj[e]).chunk(2, -1)
            part = F.linear(F.silu(gate) * up, self.down_proj[e])
            y = y.index_add(0, rows, part * weights[rows, e, None])
        return y


class Branch(nn.Module):
    def __init__(self, config, dim):
        super().__init__()
        if config.router.kind not in ROUTERS or config.experts != "swiglu":
            raise ValueError(f"{config.name}: no code for router {config.router.kind} with experts {config.experts}")
        self.weight = config.weight
        self.router = ROUTERS[config.router.kind](config.router, config.num_experts, dim)
        self.experts = Experts(config.num_experts, dim, config.hidden)


class MoE(nn.Module):
    """shared(x) + Σ weight_b · branch_b(x)."""

    def __init__(self, config, dim):
        super().__init__()
        self._fusion = config.fusion
        self._names = [branch.name for branch in config.branches]
        for branch in config.branches:  # no attributes, which modules have of their own: half, type, train
            self._modules[branch.name] = Branch(branch, dim)
        self.shared_expert = Mlp(dim, config.shared.hidden) if config.shared.hidden > 0 else None
        self.shared_expert_gate = nn.Linear(dim, 1, bias=False) if config.shared.gate else None
        if config.fusion == "learned" and self._names:
            self.fusion = nn.Module()
            self.fusion.logits = nn.Parameter(torch.zeros(len(self._names)))

    def __setattr__(self, name, value):
        if isinstance(value, nn.Module):
            super().__setattr__(name, value)
        else:  # not a branch, whatever it is called: training
            object.__setattr__(self, name, value)

    def forward(self, x, rows):
        branches = [self._modules[name] for name in self._names]
        weights, shared = [], None
        for b, branch in enumerate(branches):
            of_experts, of_shared = branch.router(x, rows)
            factor = branch.weight
            if self._fusion == "learned":
                factor = 2 * factor * wide(self.fusion.logits[b]).sigmoid()
            weights.append(of_experts * factor)
            if of_shared is not None:
                shared = of_shared * factor + (0 if shared is None else shared)
        if shared is None:
            shared = wide(x).new_ones(len(x))
        if self.shared_expert_gate is not None:
            shared = shared * wide(self.shared_expert_gate(x)).sigmoid()[:, 0]
        if self._fusion == "preserve":  # a row's coefficients sum to 1
            total = sum(w.sum(1) for w in weights) + (0 if self.shared_expert is None else shared)
            total = total.masked_fill(total == 0, 1)
            weights, shared = [w / total[:, None] for w in weights], shared / total
        y = sum(branch.experts(x, w) for branch, w in zip(branches, weights))
        if self.shared_expert is not None:
            y = y + self.shared_expert(x) * shared[:, None]
        return y.to(x.dtype)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel_residual
        norm = config.dim, config.norm_eps, config.norm == "layer"
        self.input_layernorm, self.post_attention_layernorm = Norm(*norm), Norm(*norm)
        self.self_attn = Attention(config, layer)
        self.is_moe = layer in config.moe_layers
        dense = config.dim, config.hidden, config.ffn, config.ffn_bias
        self.mlp = MoE(config.moe, config.dim) if self.is_moe else Mlp(*dense)

    def forward(self, x, rows):
        after = x + self.self_attn(self.input_layernorm(x), rows)
        normal = self.post_attention_layernorm(x if self.parallel else after)
        return after + (self.mlp(normal, rows) if self.is_moe else self.mlp(normal))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.embed_positions = nn.Embedding(config.max_seq_len, config.dim) if config.positions == "learned" else None
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_layers)])
        self.norm = Norm(config.dim, config.norm_eps, config.norm == "layer")

    def forward(self, tokens, lengths):
        """tokens [T] -> [T, D]."""
        rows = Rows(lengths, self.config, tokens.device)
        x = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            x = x + self.embed_positions(rows.positions)
        before = len(self.layers) - self.config.top_query  # with a top query the last block stands behind the norm
        for layer in self.layers[:before]:
            x = layer(x, rows)
        x = self.norm(x)
        for layer in self.layers[before:]:
            x = layer(x, rows)
        return x


class HymoeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HymoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = [r"router\.bias$", r"router\.cutoff$"]

    def __init__(self, config):
        super().__init__(config)
        c = json.loads(json.dumps(config.model), object_hook=lambda values: SimpleNamespace(**values))
        self.model = Decoder(c)
        self.lm_head = None if c.tie_embeddings else nn.Linear(c.dim, c.vocab_size, bias=c.logits_bias)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_submodule(self, target):
        module = self
        for name in target.split(".") if target else []:
            if name not in module._modules:
                raise AttributeError(f"there is no module {target}")
            module = module._modules[name]
        return module

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        """input_ids, attention_mask [B, S] -> logits [B, S, vocabulary], 0 at padding; with labels [B, S] the loss of
        the language model."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = [n for n in real.sum(1).tolist() if n > 0]
        if max(lengths) > self.config.max_position_embeddings:
            raise ValueError(f"a text has {max(lengths)} tokens, max_seq_len is {self.config.max_position_embeddings}")
        hidden = self.model(input_ids[real], lengths)
        rows = F.linear(hidden, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
        logits = rows.new_zeros(*input_ids.shape, rows.shape[-1]).masked_scatter(real[..., None], rows)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        for name, module in self.named_modules():
            if isinstance(module, Router) and not module.causal:
                raise ValueError(f"{name} looks ahead, so that this model can score texts, not write them")
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def _supports_default_dynamic_cache(cls):  # generate() makes no cache, whatever its config says
        return False
