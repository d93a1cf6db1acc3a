# A segmentor of one class.
_base_ = './binary.py'
model = dict(decode_head=dict(num_classes=1))
