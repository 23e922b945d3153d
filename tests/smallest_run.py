"""The recommend flow at a size at which every stage still does its work for real."""

from __future__ import annotations

from command_line import settings

STAGES = (
    "ingest",
    "validate",
    "split",
    "item_features",
    "align_items",
    "semantic_ids",
    "train_recommender",
    "train_reward_model",
    "align_recommender",
    "train_sasrec",
    "evaluate_recommender",
    "register",
    "report",
)
#: Both trainings leave several checkpoints.
LEARNING_RATE, STEPS, EVALUATE_EVERY, EPOCHS = 0.003, 100, 20, 4
SMALL = settings(
    ingest__simulator__users=120,
    ingest__simulator__items=128,
    ingest__simulator__interactions=6000,
    ingest__simulator__video_items=8,
    ingest__simulator__video_size=32,
    ingest__simulator__max_duration_s=3,
    item_features__dimension=16,
    item_features__block_dimension=16,
    item_features__token_dimension=16,
    align_items__steps=20,
    align_items__pairs=64,
    align_items__caption__items=16,
    semantic_ids__codebook_size=8,
    train_recommender__model__d_model=16,
    train_recommender__model__heads=2,
    train_recommender__model__encoder_layers=1,
    train_recommender__model__decoder_layers=1,
    train_recommender__model__ffn=32,
    train_recommender__learning_rate=LEARNING_RATE,
    train_recommender__batch_size=64,
    train_recommender__max_steps=STEPS,
    train_recommender__evaluate_every=EVALUATE_EVERY,
    train_recommender__patience=100,
    train_recommender__valid_beams=10,
    train_reward_model__epochs=1,
    train_reward_model__candidates=2,
    align_recommender__steps=2,
    align_recommender__users=8,
    align_recommender__group=8,
    align_recommender__format_group=8,
    align_recommender__sft_batch=32,
    align_recommender__checkpoint_every=1,
    align_recommender__rollout_workers=0,
    align_recommender__valid_users=50,
    train_sasrec__grid="{learning_rate: [0.001], dropout: [0.2], width: [16]}",
    train_sasrec__max_epochs=EPOCHS,
    train_sasrec__workers=1,
)
