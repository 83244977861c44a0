"""The training module: its loss against plain torch code, what is trained and what is not, refusals, a script run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from agglom.adaptors import AttentionAdaptor, LadderAdaptor, MLPAdaptor, OrthogonalAdaptor
from agglom.balance import Manual, TeacherDropping, Uncertainty
from agglom.data import ShardDataModule
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.features import Features, InputSpec, resize
from agglom.looking import look
from agglom.objectives import MSE
from agglom.parameters import parameter_groups
from agglom.place import own_images


def build(tiny_student, tiny_teachers, names=(), **options):
    student = options.pop("student", None) or tiny_student(summary_tokens=2)
    return Distiller(student, tiny_teachers(*names), **options)


def groups(module, **options):
    """The optimiser's groups, the one with more weight decay first."""
    options = {"lr": 1.0, "weight_decay": 0.05, **options}
    found = parameter_groups(module.student, list(module.heads.children()), module.balance, **options)
    return sorted(found, key=lambda group: -group["weight_decay"])


def batch(size=3, seed=0):
    pixels = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"image": pixels, "key": [str(i) for i in range(size)]}


def step(module, data):
    """`Distiller.step` without a trainer."""
    module._log = lambda *_: None
    return module.step(data, "train")


def plain_mlp(head, x):
    x = F.linear(x, head.first.weight, head.first.bias)
    x = F.layer_norm(x, x.shape[-1:], head.norm.weight, head.norm.bias)
    return F.linear(F.gelu(x), head.last.weight, head.last.bias)


def standardised(x):
    """(N, C) by its own mean and deviation, as in the first step."""
    x = x.double()
    return ((x - x.mean(0)) / (x.std(0) + 1e-6)).float()


def test_loss_equals_a_plain_computation(tiny_student, tiny_teachers):
    """standardise -> project -> align -> loss per image -> balance -> reduce."""
    module = build(tiny_student, tiny_teachers, balance=Manual(weights=[1.0, 0.5, 2.0])).train()
    data = batch()
    got = step(copy.deepcopy(module), data)

    images = data["image"]
    backbone = module.student.backbone
    tokens = backbone.forward_features((images - 0.5) / 0.5)
    assert tuple(module.student.input.mean) == (0.5, 0.5, 0.5)
    summaries, patches = tokens[:, :2], tokens[:, 2:]
    total = torch.zeros(3)
    for name, weight, token in (("clip", 1.0, 0), ("dino", 0.5, 1), ("sam", 2.0, None)):
        truth, adaptor = module.encoders[name](images), module.heads[name].adaptor
        loss = torch.zeros(3)
        if token is not None:
            prediction = plain_mlp(adaptor.summary, summaries[:, token])
            loss = loss + 1 - F.cosine_similarity(prediction, standardised(truth.summary))
        cells = standardised(truth.spatial.permute(0, 2, 3, 1).flatten(0, 2)).view(3, 8, 8, -1).permute(0, 3, 1, 2)
        prediction = plain_mlp(adaptor.spatial, patches).view(3, 4, 4, -1).permute(0, 3, 1, 2)
        prediction = F.interpolate(prediction, (8, 8), mode="bilinear", align_corners=False)
        cosine = 1 - F.cosine_similarity(prediction, cells, dim=1)
        smooth = F.smooth_l1_loss(prediction, cells, reduction="none").mean(1)
        loss = loss + (0.9 * cosine + 0.1 * smooth).mean((1, 2))
        total = total + weight * loss
    torch.testing.assert_close(got, total.mean(), rtol=1e-5, atol=1e-6)


def test_weight_0_is_not_built_and_not_run(tiny_student, tiny_teachers):
    calls = []

    class Counting(MSE):
        def forward(self, prediction, target, mask=None):
            calls.append(prediction.ndim)
            return super().forward(prediction, target, mask)

    teachers = tiny_teachers("clip", summary_weight=0.0, spatial_loss=Counting, summary_loss=Counting)
    module = Distiller(tiny_student(), teachers)
    step(module, batch()).backward()
    assert calls == [4]
    assert not [name for name in module.state_dict() if "heads.clip" in name and ".summary" in name]


def test_gradient_reaches_all_that_is_trained_and_nothing_else(tiny_student, tiny_teachers):
    module = build(
        tiny_student, tiny_teachers, adaptor=LadderAdaptor, student=tiny_student(summary_tokens=2, registers=1)
    )
    step(module, batch()).backward()
    missing = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
    for encoder in module.encoders.values():
        assert not any(t.requires_grad or t.grad is not None for _, t in encoder.tensors())


def test_state_has_no_teacher_tensor(tiny_student, tiny_teachers):
    module = build(tiny_student, tiny_teachers)
    assert not [key for key in module.state_dict() if key.startswith("encoders")]
    assert {key.split(".")[0] for key in module.state_dict()} <= {"trained", "balance"}


def test_only_blocks_that_an_adaptor_reads_are_tapped(tiny_student, tiny_teachers):
    assert build(tiny_student, tiny_teachers).taps == ()
    assert build(tiny_student, tiny_teachers, adaptor=LadderAdaptor).taps == ("blocks.0",)


def test_summary_tokens_in_the_order_of_their_readers(tiny_student, tiny_teachers):
    module = build(tiny_student, tiny_teachers, ("sam", "clip", "dino"))
    assert [module.heads[name].adaptor.token for name in ("clip", "dino")] == [0, 1]
    shared = build(tiny_student, tiny_teachers, student=tiny_student())
    assert {head.adaptor.token for head in shared.heads.values()} == {0}


def test_parameter_groups_hold_every_parameter_once(tiny_student, tiny_teachers):
    module = build(tiny_student, tiny_teachers, balance=Uncertainty(teachers=3), student=tiny_student(summary_tokens=2))
    decayed, plain = groups(module)
    wanted = [p for p in module.parameters() if p.requires_grad]
    assert sorted(map(id, decayed["params"] + plain["params"])) == sorted(map(id, wanted))
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    backbone = module.student.backbone
    spared = {id(p) for p in plain["params"]}
    assert {
        id(backbone.pos_embed),
        id(backbone.cls_token),
        id(backbone.reg_token),
        id(module.balance.log_sigma),
    } <= spared
    assert all(p.ndim > 1 for p in decayed["params"])


def test_remembered_teachers_run_once_an_image(tiny_student, tiny_teachers):
    module = build(tiny_student, tiny_teachers, ("clip",), student=tiny_student(), remember_teachers=True)
    seen = []
    encode = module.encoders["clip"].encode
    module.encoders["clip"].encode = lambda pixels: seen.append(len(pixels)) or encode(pixels)
    first = step(module, batch())
    module.heads["clip"].normalizers.eval()
    with torch.autocast("cpu", torch.bfloat16):  # which refuses to stack float16, the form they are remembered in
        second = step(module, batch())
    assert seen == [3] and torch.isfinite(first) and torch.isfinite(second)


@pytest.mark.parametrize(
    ("names", "options", "student", "words"),
    [
        (("sam",), {"summary_weight": 1.0}, {}, ["model.teachers.sam.summary_weight", "gives no summary"]),
        (("sam",), {"spatial_weight": -1.0}, {}, ["model.teachers.sam.spatial_weight", "-1.0"]),
        (("sam",), {"spatial_weight": 0.0}, {}, ["model.teachers.sam", "both weights are 0"]),
        (("clip", "dino"), {}, {"summary_tokens": 3}, ["summary_tokens: 3", "1 (shared) or 2", "clip, dino"]),
    ],
)
def test_refusals_in_one_line(tiny_student, tiny_teachers, names, options, student, words):
    with pytest.raises(UserError) as err:
        Distiller(tiny_student(**student), tiny_teachers(*names, **options))
    assert "\n" not in str(err.value) and all(word in str(err.value) for word in words)


def test_no_teachers():
    with pytest.raises(UserError, match="model.teachers: empty"):
        Distiller(None, {})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_training_from_a_script(scenes, tiny_student, tiny_teachers, quiet_trainer, optimizer):
    """No command line: Distiller, ShardDataModule and a plain trainer."""
    module = build(
        tiny_student, tiny_teachers, ("clip", "sam"), student=tiny_student(), optimizer=optimizer, warmup_steps=1
    )
    data = ShardDataModule(data=str(scenes), batch_size=4, size=32, num_workers=0, val_samples=4)
    before = copy.deepcopy(module.trained.state_dict())
    trainer = quiet_trainer(max_steps=2, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.logged_metrics["val/loss"])
    assert {"val/clip/summary_loss", "val/clip/spatial_loss", "val/sam/spatial_loss"} <= set(trainer.logged_metrics)
    assert not torch.equal(
        before["student.backbone.blocks.0.attn.qkv.weight"], module.student.backbone.blocks[0].attn.qkv.weight
    )


def test_unknown_optimizer_is_one_line(tiny_student, tiny_teachers):
    with pytest.raises(UserError, match="model.optimizer: 'adamv'.*adam") as err:
        build(tiny_student, tiny_teachers, ("sam",), student=tiny_student(), optimizer="adamv")
    assert "\n" not in str(err.value)


def test_adaptors_may_exempt_themselves_from_weight_decay(tiny_student, tiny_teachers):
    """An orthogonal map is decayed by nothing: decay would turn it without shrinking it."""
    module = build(tiny_student, tiny_teachers, adaptor=OrthogonalAdaptor)
    decayed, plain = groups(module)
    own = {id(p) for head in module.heads.values() for p in head.adaptor.parameters()}
    assert own and own <= {id(p) for p in plain["params"]}
    assert not own & {id(p) for p in decayed["params"]} and decayed["params"]


def test_layer_decay_follows_the_depth(tiny_student, tiny_teachers):
    """Stem d^3, blocks d^2 and d^1 of two, the final norm and all heads at the full rate."""
    module = build(tiny_student, tiny_teachers)
    rates = {id(p): g["lr"] for g in groups(module, layer_decay=0.5, lr=8.0) for p in g["params"]}
    assert len(rates) == len([p for p in module.parameters() if p.requires_grad])
    backbone = module.student.backbone
    assert rates[id(backbone.patch_embed.proj.weight)] == rates[id(backbone.pos_embed)] == 1.0
    assert rates[id(backbone.blocks[0].mlp.fc1.weight)] == 2.0
    assert rates[id(backbone.blocks[1].attn.qkv.bias)] == 4.0
    assert {rates[id(p)] for head in module.heads.values() for p in head.parameters()} == {8.0}
    decays = {id(p): g["weight_decay"] for g in groups(module, layer_decay=0.5) for p in g["params"]}
    plain = {id(p): g["weight_decay"] for g in groups(module) for p in g["params"]}
    assert decays == plain, "the rate says nothing about the decay"
    assert {g["lr"] for g in groups(module)} == {1.0}


def test_own_data_counts_for_its_teacher_alone(tiny_student, tiny_teachers):
    """DUNE's rule, from the names of the shards to the weights."""
    teachers = tiny_teachers()
    teachers["sam"].own_data, teachers["dino"].own_data = ["sa1b-*.tar"], ["lvd-00000?.tar", "sa1b-000007.tar"]
    module = Distiller(tiny_student(summary_tokens=2), teachers, balance=TeacherDropping(p=0.0, own_data=True)).train()
    data = batch(4)
    data["shard"] = ["sa1b-000001.tar", "lvd-000003.tar", "web-000001.tar", "sa1b-000007.tar"]
    own = own_images(module.own_data, data)
    assert own.tolist() == [[False] * 4, [False, True, False, True], [True, False, False, True]]
    step(module, data)
    third = 1 / 3
    expected = torch.tensor([[0, 0, third, 0], [0, 1, third, 0.5], [1, 0, third, 0.5]])
    torch.testing.assert_close(module.balance._last[0], expected)
    assert own_images({"clip": [], "dino": []}, data) is None


def test_the_student_sees_the_resolution_and_teachers_the_whole_size(tiny_student, tiny_teachers):
    from agglom.plan import Part

    module = build(tiny_student, tiny_teachers, student=tiny_student(summary_tokens=2))
    images = torch.rand(2, 3, 64, 64)
    frames = module.frames(images, Part(0, 0, 32, 64, 2), (0,))
    assert frames.student.shape[-2:] == (32, 32) and frames.view("clip") is images
    expected = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(frames.student, expected)


def test_clipping_beside_a_fused_optimizer_in_bf16(tiny_student, tiny_teachers, quiet_trainer):
    """Lightning refuses fused optimisers there unless they leave unscaling alone; gradients go with the step."""
    held = []

    class Watched(Distiller):
        def on_before_optimizer_step(self, optimizer):
            held.append(sum(p.grad is not None for p in self.parameters()))
            assert optimizer.defaults["fused"]

        def on_train_batch_end(self, *_):
            held.append(sum(p.grad is not None for p in self.parameters()))

    module = Watched(tiny_student(), tiny_teachers("clip"), warmup_steps=0)
    trainer = quiet_trainer(max_steps=2, precision="bf16-mixed", gradient_clip_val=1.0, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader([batch(2, seed) for seed in range(4)], batch_size=None))
    count = len([p for p in module.parameters() if p.requires_grad])
    assert held == [count, count, 0] * 2  # after the first micro-batch, before the step, after it


def test_teachers_of_one_contract_share_their_resized_images():
    spec, other = InputSpec(size=(32, 32), stride=8), InputSpec(size=(32, 32), stride=8, interpolation="bilinear")
    images, made, shown = torch.rand(1, 3, 48, 48), {}, []

    def see(pixels):
        shown.append(pixels)
        return Features(None, pixels)

    for contract in (spec, spec, other):
        look(see, contract, images, resolution=(48, 48), grid=(6, 6), made=made)
    assert shown[0] is shown[1] and shown[2] is not shown[1]
    torch.testing.assert_close(shown[0], resize(images, (32, 32), "bicubic"), rtol=0, atol=0)


@pytest.mark.slow
class Kept:
    """Counts the bytes that autograd keeps for the backward pass while it is entered, each storage once."""

    def __enter__(self):
        self.found = {}

        def pack(x):
            self.found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)
        self.bytes = sum(self.found.values())


@pytest.mark.parametrize("adaptor", [MLPAdaptor, LadderAdaptor, AttentionAdaptor])
def test_checkpointed_heads_give_the_same_gradients_for_less_memory(tiny_student, tiny_teachers, adaptor):
    """What is kept is what all heads share (the student's activations), the targets, and little else."""
    kept, gradients = {}, {}
    for checkpointed in (False, True):
        torch.manual_seed(0)
        module = build(tiny_student, tiny_teachers, adaptor=adaptor, checkpoint_heads=checkpointed).train()
        frames = module.frames(batch(8)["image"])
        targets = module.targets(frames, module.names)
        features = module.student(frames.student, module.taps)
        with Kept() as found:
            losses = module.losses(features, targets)
            total = sum(module.heads[name].combine(parts).mean() for name, parts in losses.items())
        total.backward()
        kept[checkpointed] = found.bytes
        gradients[checkpointed] = [p.grad for p in module.trained.parameters() if p.grad is not None]
    assert len(gradients[True]) > 20 and kept[True] < 0.4 * kept[False]
    assert all(torch.equal(one, two) for one, two in zip(*gradients.values(), strict=True))


def test_compiled_parts_give_the_same_loss(tiny_student, tiny_teachers, quiet_trainer, monkeypatch):
    compiled = []
    inductor = torch.nn.Module.compile

    def eagerly(self):  # traces as always, without a C++ compiler at the end
        compiled.append(type(self).__name__)
        inductor(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    found = []
    for parts in (None, ["student", "teachers", "heads"]):
        torch.manual_seed(0)
        module = Distiller(tiny_student(), tiny_teachers("clip"), adaptor=LadderAdaptor, warmup_steps=0, compile=parts)
        trainer = quiet_trainer(max_steps=3, log_every_n_steps=3)
        trainer.fit(module, DataLoader([batch(2, seed) for seed in range(3)], batch_size=None))
        found.append(trainer.logged_metrics["train/loss"])
    assert compiled == ["TimmStudent", "TinyTeacher", "Head"]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
