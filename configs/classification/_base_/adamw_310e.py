# As timm does it: no decay of what is one-dimensional (biases, norms, layer scales), and rates
# that change from epoch to epoch: 1e-6 to 1e-3 in 5, cosine of 300 to 1e-6, which 10 more keep.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=6),
    dict(type='CosineAnnealingLR', T_max=300, eta_min=1e-6, begin=0, end=301),
]

train_cfg = dict(by_epoch=True, max_epochs=310, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(enable=False, base_batch_size=512)  # 4 GPUs x 128 images
