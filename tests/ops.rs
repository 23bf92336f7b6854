//! Every operation of the CPU backend against the reference, at the tolerances of `backend::check`.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use tokmeter::backend::check::{OpCheck, check_ops};
use tokmeter::backend::{Cpu, CpuDType, Reference, Shape};
use tokmeter::weights::StoredDType;

const OPS: [&str; 7] = ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"];

fn check_cpu(dtype: CpuDType, stored: StoredDType) -> Vec<OpCheck> {
    check_ops(|shape| Ok(Reference::new(shape)), |shape| Ok(Cpu::new(shape, dtype)), stored, |_| true)
        .unwrap()
}

fn assert_all_pass(checks: &[OpCheck]) {
    let failed: Vec<&OpCheck> = checks.iter().filter(|check| !check.passed).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), checks.len());
    for op in OPS {
        let worst = checks.iter().filter(|check| check.op == op).map(|check| check.tolerance_used);
        let worst = worst.fold(0.0, f64::max);
        assert!(checks.iter().filter(|check| check.op == op).count() >= 25, "{op} was not checked");
        println!("{op}: {worst:.3} of the tolerance used");
    }
}

#[test]
fn the_cpu_backend_in_f32_agrees_with_the_reference() {
    assert_all_pass(&check_cpu(CpuDType::F32, StoredDType::F32));
}

#[test]
fn half_precision_weights_become_the_same_f32_values_on_both_backends() {
    assert_all_pass(&check_cpu(CpuDType::F32, StoredDType::BF16));
}

/// Blocks are multiplied by activations that are not rounded, so the tolerance is that of f32. One type of each
/// geometry; the unit tests of the blocks cover all ten.
#[test]
fn blocks_that_are_kept_agree_with_the_reference_on_their_dequantised_values() {
    for stored in [StoredDType::Q4_1, StoredDType::Q8_0, StoredDType::Q6K] {
        println!("{stored:?}");
        assert_all_pass(&check_cpu(CpuDType::Quantized, stored));
    }
}

#[test]
fn an_operation_that_is_wrong_does_not_pass() {
    // Another rotation base in one backend must show in attn_in and in attention, and nowhere else.
    let bent = |mut shape: Shape| {
        shape.inv_freq.iter_mut().for_each(|frequency| *frequency *= 1.01);
        Ok(Cpu::new(shape, CpuDType::F32))
    };
    let checks = check_ops(|shape| Ok(Reference::new(shape)), bent, StoredDType::F32, |_| true).unwrap();
    for op in OPS {
        let failed = checks.iter().any(|check| check.op == op && !check.passed);
        assert_eq!(failed, op.starts_with("attn_in") || op == "attention", "{op}");
    }
}
