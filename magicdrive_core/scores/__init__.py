"""How good the generated videos are: Fréchet distances, a detector's mAP, BEV masks' mIoU, the W-CODA score."""
