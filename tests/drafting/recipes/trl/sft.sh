#!/bin/bash
# One GPU
MODEL="HuggingFaceTB/SmolLM2-135M-Instruct"
export OUTPUT=outputs/sft

CUDA_VISIBLE_DEVICES=0 trl sft \
    --model_name_or_path $MODEL \
    --dataset_name ../data/chat.jsonl \
    --max_length 512 \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --per_device_train_batch_size=2 \
    --gradient_accumulation_steps 1 \
    --logging_steps 25 \
    --eval_strategy no \
    --use_peft \
    --lora_r 8 \
    --lora_target_modules q_proj v_proj \
    --run_name "run-$(date +%s)" \
    --output_dir ${OUTPUT}
