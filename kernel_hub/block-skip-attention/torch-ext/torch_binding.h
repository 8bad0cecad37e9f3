#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

// Shapes and meaning: torch-ext/block_skip_attention/__init__.py.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
forward_cpu(torch::stable::Tensor q, torch::stable::Tensor k, torch::stable::Tensor v,
            std::optional<torch::stable::Tensor> key_valid,
            std::optional<torch::stable::Tensor> q_offset,
            std::optional<torch::stable::Tensor> sinks,
            std::optional<torch::stable::Tensor> log_lambda,
            std::optional<torch::stable::Tensor> block_threshold,
            std::optional<torch::stable::Tensor> max_dropped_mass, double scale, bool causal,
            int64_t window, double softcap, int64_t block_q, int64_t block_k, int64_t order,
            int64_t split_k, bool keep_sink, bool return_skips, bool return_dropped_mass,
            std::optional<torch::stable::Tensor> int8_keys, double expected_sparsity);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
forward_cuda(torch::stable::Tensor q, torch::stable::Tensor k, torch::stable::Tensor v,
             std::optional<torch::stable::Tensor> key_valid,
             std::optional<torch::stable::Tensor> q_offset,
             std::optional<torch::stable::Tensor> sinks,
             std::optional<torch::stable::Tensor> log_lambda,
             std::optional<torch::stable::Tensor> block_threshold,
             std::optional<torch::stable::Tensor> max_dropped_mass, double scale, bool causal,
             int64_t window, double softcap, int64_t block_q, int64_t block_k, int64_t order,
             int64_t split_k, bool keep_sink, bool return_skips, bool return_dropped_mass,
             std::optional<torch::stable::Tensor> int8_keys, double expected_sparsity);

void append_int8_keys_cpu(torch::stable::Tensor k, torch::stable::Tensor position,
                          torch::stable::Tensor copy);

void append_int8_keys_cuda(torch::stable::Tensor k, torch::stable::Tensor position,
                           torch::stable::Tensor copy);

// dq, dk, dv and dsinks (empty without sinks).
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
backward_cpu(torch::stable::Tensor dout, std::optional<torch::stable::Tensor> dlse,
             torch::stable::Tensor q, torch::stable::Tensor k, torch::stable::Tensor v,
             torch::stable::Tensor out, torch::stable::Tensor lse, torch::stable::Tensor skips,
             std::optional<torch::stable::Tensor> key_valid,
             std::optional<torch::stable::Tensor> q_offset,
             std::optional<torch::stable::Tensor> sinks, double scale, bool causal, int64_t window,
             double softcap, int64_t block_q, int64_t block_k);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
observe_cpu(torch::stable::Tensor q, torch::stable::Tensor k, torch::stable::Tensor v,
            std::optional<torch::stable::Tensor> sinks, double scale, int64_t window,
            double softcap, torch::stable::Tensor geometries, torch::stable::Tensor kept,
            bool keep_sink, torch::stable::Tensor groups, int64_t group_count,
            torch::stable::Tensor eps, int64_t bins, double u_min, double bins_per_nat,
            double mass_unit, int64_t sample_from, int64_t sample_every);

// Rotary position embedding of x in place.
void rotate_cpu(torch::stable::Tensor x, torch::stable::Tensor cos, torch::stable::Tensor sin,
                std::optional<torch::stable::Tensor> norm, double eps);

// The level of instructions that a call would run on now.
std::string cpu_level();
