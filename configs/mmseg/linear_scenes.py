# Linear segmentation of a frozen backbone inside mmsegmentation: batch norm and a 1x1 convolution on its feature map.
# Needs:   pip install 'agglom[mmseg]'; agglom data scenes --out data/scenes
# Command: agglom mmseg train configs/mmseg/linear_scenes.py
#          (other backbones and shards: a copy with other values below)
# Cost:    0.3 to 1.2 s a step with one thread, on two CPU cores shared with other work: 13 minutes in all
custom_imports = dict(imports=["agglom.mmseg"], allow_failed_imports=False)
default_scope = "mmseg"

ref = "tiny:dino"  # any model reference: an export, a run, timm:NAME, open_clip:NAME/TAG, tiny:NAME
channels = 192  # of its feature map
root = "data/scenes"  # shards with images and masks
classes = 11  # of the masks: background and ten garments; their names come with the shards
crop = (64, 64)  # (height, width) in pixels; a model of fixed input size resizes the crop to it
steps = 1000

model = dict(
    type="EncoderDecoder",
    # pixels in [0, 1]: the backbone normalises by itself
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop,
    ),
    backbone=dict(type="agglom.Backbone", model=ref),
    neck=dict(type="agglom.BatchNorm", channels=[channels]),
    decode_head=dict(
        type="FCNHead",
        num_convs=0,  # nothing between the map and the 1x1 convolution
        concat_input=False,
        in_channels=channels,
        in_index=0,
        channels=channels,
        num_classes=classes,
        dropout_ratio=0.0,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),  # large pictures: dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
)

# pillow decodes as the rest of agglom does, so that both see the same pixels of a JPEG
load = [dict(type="LoadImageFromFile", imdecode_backend="pillow"), dict(type="LoadAnnotations")]
train_pipeline = [
    *load,
    dict(type="RandomResize", scale=crop, ratio_range=(1.0, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
loader = dict(num_workers=1, persistent_workers=True)
train_dataloader = dict(
    batch_size=16,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="agglom.ShardDataset", data_root=root, split="train", pipeline=train_pipeline),
    **loader,
)
test = dict(type="agglom.ShardDataset", data_root=root, pipeline=[*load, dict(type="PackSegInputs")])
in_order = dict(type="DefaultSampler", shuffle=False)
val_dataloader = dict(batch_size=32, sampler=in_order, dataset=dict(split="val", **test), **loader)
test_dataloader = dict(batch_size=32, sampler=in_order, dataset=dict(split="test", **test), **loader)
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])

# the schedule of mmseg's ADE20K recipes, shortened: AdamW, linear warm-up, then a polynomial of power 0.9
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-2, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=50, end=steps, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=steps),
    visualization=dict(type="SegVisualizationHook"),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
randomness = dict(seed=0)
