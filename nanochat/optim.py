"""
MuonAdamW: one optimizer for the whole model. Matrices of blocks take Muon steps, everything else takes AdamW steps.

In:  parameters in groups (param_groups below decides which), their gradients.
Out: updated parameters, the same on every rank. Each rank keeps the optimizer state of its own shard only (ZeRO-2,
     arXiv 1910.02054): gradients are reduce-scattered, each rank updates its shard, parameters are all-gathered.
     gloo (CPU) has no dependable reduce_scatter, so there the gradients are all-reduced and each rank takes its slice.

K = matrices of one shape, (m, n) = that shape, w = ranks, c = ceil(size / w) = what one rank owns
"""

import torch
import torch.distributed as td
from torch.optim.adamw import adamw  # its fused kernel: one pass over memory, on CPU as on CUDA

from nanochat.common import Dist
from nanochat.muon import muon_dtype, muon_step, variance_dim


# ---------------------------------------------------------------------------------------------------------------------
# Which parameter takes which step

def param_groups(gpt, extra=None, *, matrix_lr=0.02, embed_lr=0.3, value_lr=0.15, head_lr=0.008, resid_lr=0.005, x0_lr=0.05,
                 weight_decay=0.28, extra_lr=0.01, lens_lr=0.01, lr_scale=1.0):
    """
    Sort every trainable parameter into exactly one group.

    gpt          the language model; its parameter names decide (blocks.* matrices -> Muon, tables and scalars -> AdamW)
    extra        {"gistnet": module, ...} trained beside it: matrices -> Muon at matrix_lr, embeddings, slots, places, biases
                 and scalars -> AdamW at extra_lr. "lensnet" -> AdamW at lens_lr, which lr_scale leaves alone: it learns from
                 a few labels now and then, however large a batch is (LOG.md, 2026-11-22)
    lr_scale     multiplies the other learning rates (batch size rule, schedule.plan)
    AdamW rates of tables are scaled by (D / 768)^-0.5: tuned at D = 768, and their gradients are dense in D.
    """
    tables = (gpt.embed_table.weight.shape[1] / 768) ** -0.5
    adam = lambda lr, betas, wd: dict(kind="adamw", lr=lr, betas=betas, eps=1e-10, weight_decay=wd)
    muon = lambda lr: dict(kind="muon", lr=lr, momentum=0.95, beta2=0.9, weight_decay=weight_decay)
    settings = {
        "matrices": muon(matrix_lr),
        "head": adam(head_lr * tables, (0.8, 0.96), 0.01),
        "embed": adam(embed_lr * tables, (0.8, 0.995), 0.001),
        "values": adam(value_lr * tables, (0.8, 0.995), 0.01),
        "resid": adam(resid_lr, (0.8, 0.95), 0.05),
        "x0": adam(x0_lr, (0.96, 0.95), 0.0),
        "lensnet": adam(lens_lr / lr_scale, (0.8, 0.95), 0.0), # times lr_scale, as all of them, it is lens_lr
    }
    members = [(f"gpt.{name}", p, _gpt_group(name, p)) for name, p in _trainable(gpt)]
    for module_name, module in (extra or {}).items():
        assert module_name != "gpt", "the name 'gpt' is taken by the language model"
        settings[f"{module_name} matrices"] = muon(matrix_lr)
        settings[f"{module_name} rest"] = adam(extra_lr, (0.8, 0.95), 0.0)
        members += [(f"{module_name}.{name}", p, "lensnet" if module_name == "lensnet" else f"{module_name} {_extra_group(name, p)}")
                    for name, p in _trainable(module)]

    homeless = [f"{name} {tuple(p.shape)}" for name, p, group in members if group is None]
    assert not homeless, f"parameters that no optimizer group takes: {homeless}. Add a rule in optim._gpt_group"
    ids = [id(p) for _, p, _ in members]
    assert len(ids) == len(set(ids)), "a parameter is shared between modules: it would be stepped twice"
    groups = []
    for label, setting in settings.items():
        chosen = [(name, p) for name, p, group in members if group == label]
        if chosen:
            lr = setting.pop("lr") * lr_scale
            groups.append(dict(label=label, names=[name for name, _ in chosen], params=[p for _, p in chosen],
                               lr=lr, initial_lr=lr, initial_weight_decay=setting["weight_decay"], **setting))
    return groups


def _trainable(module):
    """Named trainable parameters; a compiled module's names are the plain module's."""
    return [(name.replace("_orig_mod.", ""), p) for name, p in module.named_parameters() if p.requires_grad]


def _gpt_group(name, p):
    if (name.startswith("blocks.") or name == "previous.weight") and p.ndim == 2:
        return "matrices"
    known = {"embed_table.weight": "embed", "lm_head.weight": "head", "resid_scale": "resid", "x0_scale": "x0"}
    return "values" if name.startswith("value_tables.") else known.get(name)


def _extra_group(name, p):
    looked_up = any(word in name for word in ("embedding", "slot", "place"))
    matrix = name.split(".")[-1] == "weight" and p.ndim == 2 and min(p.shape) > 1
    return "matrices" if matrix and not looked_up else "rest"


def make_optimizer(gpt, extra=None, dist=Dist(), compile=False, dtype=None, **settings):
    """The optimizer of a model and the modules trained beside it; dtype as in MuonAdamW, settings as in param_groups."""
    return MuonAdamW(param_groups(gpt, extra, **settings), dist, compile, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sharding. A bucket is what is reduced, updated and gathered together: a stack of K same-shaped matrices for Muon, one
# flat parameter for AdamW. Rank r owns items [r * c, (r + 1) * c) of it; the end is padded with zeros up to w * c.

def reduce_mean(full, dist):
    """(w * c, ...) on every rank -> (my c items of the mean over ranks, a function to call before reading them)."""
    if dist.world == 1:
        return full, lambda: None
    c = len(full) // dist.world
    if full.is_cuda:
        mine = torch.empty_like(full[:c])
        work = td.reduce_scatter_tensor(mine, full, op=td.ReduceOp.AVG, async_op=True)
        return mine, work.wait
    work = td.all_reduce(full, async_op=True)  # gloo: everyone gets everything, and has no average
    mine = full[dist.rank * c:(dist.rank + 1) * c]

    def finish():
        work.wait()
        mine.div_(dist.world)
    return mine, finish


def gather(mine, dist, out=None):
    """My c items -> all w * c items, on every rank, written to `out` if given. Returns (tensor, function to wait)."""
    if dist.world == 1:
        assert out is None or out.data_ptr() == mine.data_ptr()
        return mine, lambda: None
    if out is None:
        out = mine.new_empty((len(mine) * dist.world, *mine.shape[1:]))
    mine = mine if mine.is_cuda else mine.clone()  # NCCL gathers in place, gloo does not promise to
    work = td.all_gather_into_tensor(out, mine.contiguous(), async_op=True)
    return out, work.wait


def pad_to(tensor, size):
    """Zeros appended along dim 0 up to `size` items; the tensor itself if it is that long already."""
    missing = size - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])


class MuonBucket:
    """K matrices of one shape in one group: batched products instead of K small ones."""

    def __init__(self, group, names, params, dist, step):
        self.group, self.names, self.params, self.dist, self.step = group, names, params, dist, step
        self.c = -(-len(params) // dist.world)
        self.owned = range(min(dist.rank * self.c, len(params)), min((dist.rank + 1) * self.c, len(params)))
        m, n = params[0].shape
        zeros = lambda *shape: torch.zeros(len(self.owned), *shape, device=params[0].device)
        self.state = {"momentum": zeros(m, n), "variance": zeros(m, 1) if variance_dim(m, n) == -1 else zeros(1, n)}

    def reduce(self, live):
        self.live = [live[name] for name in self.names]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        full = pad_to(torch.stack(grads).float(), self.c * self.dist.world)
        self.grads, self.wait = reduce_mean(full, self.dist)

    def update(self):
        rows = [i - self.owned.start for i in self.owned if self.live[i]]  # which of mine have a gradient
        params = torch.stack([self.params[i] for i in self.owned]).float() if self.owned else None
        if rows:
            pick = slice(None) if len(rows) == len(self.owned) else torch.tensor(rows, device=params.device)
            mine = [x[pick] for x in (params, self.grads[:len(self.owned)], *self.state.values())]
            self.step(*mine, self.group["lr"], self.group["momentum"], self.group["beta2"], self.group["weight_decay"])
            if isinstance(pick, torch.Tensor):  # picking copied: write back
                for whole, part in zip((params, None, *self.state.values()), mine):
                    if whole is not None:
                        whole[pick] = part
        if self.dist.world == 1:
            self.out = params
        else:
            mine = self.grads.new_zeros(0, *self.params[0].shape) if params is None else params
            self.out, self.wait = gather(pad_to(mine, self.c), self.dist)

    def finish(self):
        self.wait()
        torch._foreach_copy_(self.params, list(self.out[:len(self.params)].unbind(0)))
        self.grads = self.out = None

    def full_state(self):
        """{name.key: tensor} of every parameter, gathered from all ranks (every rank must call)."""
        full = {}
        for key, value in self.state.items():
            whole, wait = gather(pad_to(value, self.c), self.dist)
            wait()
            full |= {f"{name}.{key}": whole[i].cpu().clone() for i, name in enumerate(self.names)}
        return full

    def load(self, name, key, value):
        i = self.names.index(name)
        if i in self.owned:
            self.state[key][i - self.owned.start].copy_(value)

    def shapes(self):
        return {(name, key): value.shape[1:] for name in self.names for key, value in self.state.items()}


class AdamBucket:
    """One parameter of an AdamW group, seen flat. State and arithmetic are fp32 whatever the parameter is stored in."""

    def __init__(self, group, name, param, dist):
        assert param.is_contiguous(), f"{name} must be contiguous to be sharded"
        self.group, self.names, self.param, self.dist = group, [name], param, dist
        self.c = -(-param.numel() // dist.world)
        zeros = lambda: torch.zeros(self.c, device=param.device)
        self.state = {"exp_avg": zeros(), "exp_avg_sq": zeros()}
        self.steps = torch.zeros((), device=param.device)

    def flat(self, tensor):
        return pad_to(tensor.detach().reshape(-1), self.c * self.dist.world)

    def reduce(self, live):
        grad = torch.zeros_like(self.param) if self.param.grad is None else self.param.grad
        self.grads, self.wait = reduce_mean(self.flat(grad), self.dist)

    def update(self):
        whole = self.flat(self.param)
        mine = whole[self.dist.rank * self.c:(self.dist.rank + 1) * self.c]
        params = mine.float()  # the shard itself when it is fp32 already
        beta1, beta2 = self.group["betas"]
        adamw([params], [self.grads.float()], [self.state["exp_avg"]], [self.state["exp_avg_sq"]], [],
              [self.steps], fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
              lr=self.group["lr"], weight_decay=self.group["weight_decay"], eps=self.group["eps"])
        mine.copy_(params)
        self.out, self.wait = gather(mine, self.dist, whole if self.dist.world > 1 else None)

    def finish(self):
        self.wait()
        flat = self.out[:self.param.numel()]
        if flat.data_ptr() != self.param.data_ptr():  # padded: the shard was cut from a copy
            self.param.copy_(flat.view_as(self.param))
        self.grads = self.out = None

    def full_state(self):
        name, full = self.names[0], {}
        for key, value in self.state.items():
            whole, wait = gather(value, self.dist)
            wait()
            full[f"{name}.{key}"] = whole[:self.param.numel()].view(self.param.shape).cpu().clone()
        return full | {f"{name}.steps": self.steps.cpu().clone()}

    def load(self, name, key, value):
        if key == "steps":
            self.steps.copy_(value)
        else:
            self.state[key].copy_(self.flat(value)[self.dist.rank * self.c:(self.dist.rank + 1) * self.c])

    def shapes(self):
        name = self.names[0]
        return {(name, "exp_avg"): self.param.shape, (name, "exp_avg_sq"): self.param.shape, (name, "steps"): ()}


# ---------------------------------------------------------------------------------------------------------------------

class MuonAdamW:
    """
    step() after backward() on every rank. Schedules write into `param_groups` (lr, momentum, weight_decay), or call
    set_schedule(). `skipped` counts the steps refused for a gradient that was not finite.

    A parameter whose .grad is None on every rank is left alone (a network that learns every 4th step must not drift on
    its momentum in between); None on some ranks counts as zero there.
    """

    def __init__(self, groups, dist=Dist(), compile=False, dtype=None):
        """dtype: of Muon's matrix products (None: bf16 on GPUs that have it, fp32 elsewhere)."""
        self.param_groups, self.dist, self.skipped, self.buckets = groups, dist, 0, []
        dtype = dtype or muon_dtype(groups[0]["params"][0].device)
        compiled = torch.compile(muon_step, dynamic=False) if compile else muon_step
        number = torch.tensor if compile else float  # compiled: a tensor, or each new learning rate would recompile
        step = lambda params, grads, buffer, variance, *numbers: compiled(
            params, grads, buffer, variance, *map(number, numbers), dtype)
        for group in groups:
            named = list(zip(group["names"], group["params"]))
            if group["kind"] == "adamw":
                self.buckets += [AdamBucket(group, name, p, dist) for name, p in named]
                continue
            for shape in dict.fromkeys(p.shape for _, p in named):
                names, params = map(list, zip(*[(name, p) for name, p in named if p.shape == shape]))
                self.buckets.append(MuonBucket(group, names, params, dist, step))

    def set_schedule(self, lr=1.0, momentum=None, weight_decay=1.0):
        """lr multiplies every initial rate; momentum and the weight decay multiplier are Muon's (AdamW's are constants)."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr
            if group["kind"] == "muon":
                group["momentum"] = group["momentum"] if momentum is None else momentum
                group["weight_decay"] = group["initial_weight_decay"] * weight_decay

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, norm=False, check=False, grad_scale=1.0):
        """
        Update every parameter from its .grad (which is used up: zero_grad() comes next).

        norm         return the norm of the mean gradient over all ranks, as a tensor (reading it waits for the device)
        check        refuse the step if that norm is not finite; costs one wait per step, so bf16 and fp32 runs skip it
        grad_scale   divide gradients by this first (fp16 loss scaling)
        """
        live = self._who_has_gradients()
        active = [bucket for bucket in self.buckets if any(live[name] for name in bucket.names)]
        together = self.dist.world > 1 or check  # overlap with the wires; alone, one bucket at a time saves memory
        squares = []
        for wave in [active] if together else [[bucket] for bucket in active]:
            for bucket in wave:  # phase 1: start every reduction
                bucket.reduce(live)
            if check:
                total = self._norm([self._arrived(bucket, grad_scale, True) for bucket in wave])
                if not torch.isfinite(total):
                    self.skipped += 1
                    return total
            for bucket in wave:  # phase 2: as each arrives, update my shard and send it on
                if not check:
                    squares.append(self._arrived(bucket, grad_scale, norm))
                bucket.update()
            for bucket in wave:  # phase 3: receive the others' shards
                bucket.finish()
        if check:
            return total
        return self._norm(squares) if norm else None

    def _arrived(self, bucket, grad_scale, norm):
        bucket.wait()
        if grad_scale != 1.0:
            bucket.grads.div_(grad_scale)
        return bucket.grads.float().square().sum() if norm else None

    def _norm(self, squares):
        total = torch.stack(squares).sum() if squares else torch.zeros(())
        if self.dist.world > 1:
            td.all_reduce(total)
        return total.sqrt()

    def _who_has_gradients(self):
        """{name: has any rank a gradient for it}. Decided on the CPU, so the device is not waited for."""
        names = [name for group in self.param_groups for name in group["names"]]
        has = [p.grad is not None for group in self.param_groups for p in group["params"]]
        if self.dist.world > 1:
            flags = torch.tensor(has, dtype=torch.uint8)
            td.all_reduce(flags, op=td.ReduceOp.MAX)
            has = flags.tolist()
        return dict(zip(names, map(bool, has)))

    def state_dict(self):
        """{"<parameter>.<what>": CPU tensor}, whole on rank 0 and empty elsewhere. Every rank must call it."""
        full = {}
        for bucket in self.buckets:
            part = bucket.full_state()
            if self.dist.main:
                full |= part
        return full

    @torch.no_grad()
    def load_state_dict(self, state, partial=False):
        """Each rank takes its shard of a whole state, written by any number of ranks. partial: absent names stay zero."""
        shapes = {key: (bucket, shape) for bucket in self.buckets for key, shape in bucket.shapes().items()}
        absent = [f"{name}.{key}" for name, key in shapes if f"{name}.{key}" not in state]
        unknown = sorted(set(state) - {f"{name}.{key}" for name, key in shapes})
        if not partial and (absent or unknown):
            raise ValueError(f"the saved optimizer state is of another model: it lacks {absent[:3]} ({len(absent)}), "
                             f"and has {unknown[:3]} ({len(unknown)}) that nothing here takes")
        for (name, key), (bucket, shape) in shapes.items():
            value = state.get(f"{name}.{key}")
            if value is None:
                continue
            if value.shape != torch.Size(shape):
                raise ValueError(f"optimizer state {name}.{key} has shape {tuple(value.shape)}, "
                                 f"this model needs {tuple(shape)}")
            bucket.load(name, key, value.to(bucket.state[key] if key in bucket.state else bucket.steps))
