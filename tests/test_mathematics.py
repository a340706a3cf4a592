"""The statements that follow from the mathematics of post-training, and which tests hold each of them."""

import ast
from pathlib import Path

import numpy as np
import pytest

STATEMENTS = {
    "the expected sampled-token gradient is the full-vocabulary reverse-KL gradient": (
        "test_losses_distill.py::test_the_expected_sampled_token_gradient_is_the_full_vocabulary_one",
    ),
    "k3 as a loss is the forward KL's gradient; (policy / old) k3 the reverse's, unless the ratio is a constant": (
        "test_losses_kl.py::test_k3_as_a_loss_has_the_forward_kl_gradient",
        "test_losses_kl.py::test_importance_weighted_k3_has_the_reverse_kl_gradient",
        "test_losses_kl.py::test_stopping_the_gradient_of_the_ratio_brings_the_forward_kl_back",
    ),
    "a teacher equal to the student: loss, advantage and gradient are 0": (
        "test_losses_distill.py::test_a_teacher_equal_to_the_student_gives_no_advantage_loss_or_gradient",
        "test_distill.py::test_a_teacher_equal_to_the_student_teaches_nothing",
    ),
    "Dr. GRPO's advantage x G / (G - 1) is RLOO's": (
        "test_losses_advantage.py::test_centred_advantage_times_g_over_g_minus_one_is_leave_one_out",
    ),
    "GSPO of one token is the token ratio; CISPO on policy is REINFORCE; DAPO of one length is GRPO up to scale": (
        "test_losses_variants.py::test_gspo_of_one_token_answers_is_the_token_ratio_loss",
        "test_losses_variants.py::test_cispo_on_policy_is_reinforce",
        "test_losses_variants.py::test_dapo_with_answers_of_one_length_is_grpo_up_to_scale",
    ),
    "equal rewards give no gradient in any variant": (
        "test_losses_variants.py::test_equal_rewards_give_exactly_no_gradient_in_every_variant",
        "test_losses_advantage.py::test_equal_rewards_have_advantage_exactly_zero",
        "test_rl.py::test_equal_rewards_give_no_gradient_at_all",
    ),
    "V3.2's mask never drops A >= 0, and nothing while the sampler is the policy": (
        "test_losses_mismatch.py::test_the_off_policy_mask_drops_only_drifted_sequences_with_negative_advantage",
        "test_losses_mismatch.py::test_the_off_policy_mask_drops_nothing_when_the_sampler_is_the_policy",
        "test_losses_variants.py::test_v32_drops_drifted_negative_sequences_and_never_positive_ones",
    ),
    "TIS without a cap is importance sampling; at 1 it never weighs up": (
        "test_losses_mismatch.py::test_truncation_without_a_cap_is_plain_importance_sampling",
        "test_losses_mismatch.py::test_truncation_at_one_never_weighs_up",
    ),
    "among the kept tokens the trainer's log-prob is what the truncated sampler reported": (
        "test_losses_variants.py::test_log_probs_among_the_kept_tokens_are_those_the_sampler_reports",
        "test_rl.py::test_under_a_kept_sampling_mask_the_trainer_reports_what_a_truncated_sampler_did",
    ),
    "DPO at the reference is log 2, length-normalised too; so is a reward model's loss at equal scores": (
        "test_losses_preference.py::test_where_policy_and_reference_agree_every_loss_has_its_known_value",
        "test_losses_preference.py::test_margins_move_the_point_of_indifference",
    ),
    "PPO's first minibatch has ratio 1 and clips nothing; GAE(1, 1) is the return minus the value": (
        "test_losses_policy.py::test_the_first_minibatch_is_plain_reinforce",
        "test_rl.py::test_at_the_first_update_the_ratio_is_one_and_nothing_is_clipped",
        "test_losses_shaping.py::test_gae_without_discount_or_decay_is_the_return_minus_the_value",
    ),
    "merging: weight 1 returns the model, TIES of one and of conflicting signs, DARE's mean, SLERP's ends and norm": (
        "test_merge_math.py::test_linear_with_one_weight_returns_that_model_bit_for_bit",
        "test_merge_math.py::test_ties_of_one_whole_model_returns_it",
        "test_merge_math.py::test_ties_gives_up_entries_whose_signs_cancel",
        "test_merge_math.py::test_dare_drops_the_share_asked_for_and_has_the_task_vector_as_its_mean",
        "test_merge_math.py::test_slerp_endpoints_are_exact_with_and_without_a_base",
        "test_merge_math.py::test_slerp_of_orthogonal_vectors_keeps_the_norm",
        "test_merge_math.py::test_merges_keep_shape_and_dtype_and_compute_as_float32_does",
    ),
    "Ghost Attention trains the last turn alone; the language reward is a share; only a missing end is penalised": (
        "test_losses_shaping.py::test_ghost_attention_counts_the_last_assistant_turn_alone",
        "test_losses_shaping.py::test_the_language_reward_is_a_share",
        "test_losses_shaping.py::test_only_answers_without_an_end_are_penalised_and_their_reward_is_replaced",
    ),
    "the gradient is the same for any split into micro-batches": (
        "test_losses_masked.py::test_the_gradient_is_the_same_for_any_split_into_micro_batches",
        "test_step.py::test_accumulated_micro_batches_are_one_batch",
        "test_losses_properties.py::test_no_loss_changes_with_packing_micro_batches_padding_or_devices",
    ),
    "each answer has exactly one teacher; the gradient is the weighted sum of each one's": (
        "test_losses_distill_variants.py::test_each_token_is_scored_by_exactly_its_own_teacher",
        "test_losses_distill_variants.py::"
        "test_the_gradient_over_teachers_is_the_weighted_sum_of_each_ones_and_tool_output_adds_nothing",
        "test_distill.py::test_each_answer_is_scored_by_exactly_its_domains_teacher",
        "test_distill.py::test_a_teachers_weight_scales_its_gradient_and_not_the_divisor",
    ),
    "the KL by chunks is the unchunked one; rebuilt teacher logits are the teacher's": (
        "test_losses_chunked.py::test_any_chunking_equals_the_whole_vocabulary",
        "test_losses_chunked.py::test_teacher_logits_rebuilt_from_hidden_states_are_the_teachers_own",
        "test_distill.py::test_the_full_vocabulary_loss_from_hidden_states_is_the_kl_of_logits",
    ),
    "restarting unfinished answers shortens them, going on with the same noise does not": (
        "test_mathematics.py::test_answers_started_anew_after_an_interruption_are_shorter_and_resumed_ones_are_not",
        "test_resume.py::test_a_run_that_ends_again_and_again_reaches_bit_for_bit_what_an_uninterrupted_one_does",
    ),
}
"""What must hold, and the tests that would fail if it did not."""


@pytest.mark.parametrize("statement", STATEMENTS)
def test_what_follows_from_the_mathematics_is_tested_where_the_table_says(statement):
    for where in STATEMENTS[statement]:
        file, name = where.split("::")
        tree = ast.parse((Path(__file__).parent / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where


def test_answers_started_anew_after_an_interruption_are_shorter_and_resumed_ones_are_not():
    """Answers end with probability 0.02 at each token; the machine goes away every 60 tokens."""
    draws = np.random.default_rng(0).geometric(0.02, size=(4000, 200))
    whole = draws[:, 0]
    anew = np.array([next(length for length in again if length <= 60) for again in draws])  # other noise each time
    resumed = sum(np.clip(whole - 60 * window, 0, 60) for window in range(10))  # the same noise, from where it was
    error = 2 * np.std(whole) / np.sqrt(len(whole))
    assert abs(np.mean(resumed) - 50) < error and abs(np.mean(whole) - 50) < error
    assert np.mean(anew) < 25 < 50 - 10 * error
