//! Every operation of the CPU backend against the reference, at the tolerances of `backend::check`.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::cell::Cell;
use std::collections::BTreeSet;

use tokmeter::arch::Op;
use tokmeter::backend::check::{Case, OpCheck, Verdict, cases, check_cases, check_ops};
use tokmeter::backend::{Cpu, CpuDType, Reference, Shape};
use tokmeter::weights::StoredDType;

const OPS: [&str; 7] = ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"];

fn check_cpu(dtype: CpuDType, stored: StoredDType) -> Vec<OpCheck> {
    check_ops(|shape| Ok(Reference::new(shape)), |shape| Ok(Cpu::new(shape, dtype)), stored, |_| true)
        .unwrap()
}

fn assert_all_pass(checks: &[OpCheck]) {
    let failed: Vec<&OpCheck> = checks.iter().filter(|check| !check.passed()).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), checks.len());
    for op in OPS {
        let worst = checks.iter().filter(|check| check.op == op).map(|check| check.deviation.tolerance_used);
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
        let verdicts = checks.iter().filter(|check| check.op == op).map(|check| check.deviation.verdict());
        let expected = if matches!(op, "attn_in" | "attention") { Verdict::Wrong } else { Verdict::Ok };
        assert_eq!(verdicts.max(), Some(expected), "{op}");
    }
}

#[test]
fn every_case_can_be_named_alone() {
    for op in Op::ALL {
        let texts: Vec<String> =
            cases(|_| true).iter().filter(|case| case.op() == op).map(Case::text).collect();
        assert!(texts.len() >= 49, "{}: {}", op.name(), texts.len());
        for text in &texts {
            let found = texts.iter().filter(|other| other.contains(text.as_str())).count();
            assert_eq!(found, 1, "{}: {text}", op.name());
        }
    }
}

fn check_some(cases: &[Case], made: &Cell<usize>) -> Vec<OpCheck> {
    let candidate = |shape| {
        made.set(made.get() + 1);
        Ok(Cpu::new(shape, CpuDType::F32))
    };
    check_cases(|shape| Ok(Reference::new(shape)), candidate, StoredDType::F32, cases).unwrap()
}

/// Also that of a part that others precede in the whole check.
#[test]
fn a_case_alone_has_the_numbers_of_the_whole_check_and_makes_one_backend() {
    let all: Vec<Case> = cases(|_| true).into_iter().filter(|case| case.shape == "odd sizes").collect();
    let whole = check_some(&all, &Cell::new(0));
    let found = |case: &Case| (case.op().name(), case.text());
    assert_eq!(whole.len(), all.len());
    let mut parts = BTreeSet::new();
    for case in &all {
        // Every part once.
        if !parts.insert((case.op().name(), case.part())) {
            continue;
        }
        let made = Cell::new(0);
        let alone = check_some(std::slice::from_ref(case), &made);
        let among = whole.iter().find(|check| (check.op, check.case.clone()) == found(case));
        assert_eq!((alone.as_slice(), made.get()), (std::slice::from_ref(among.unwrap()), 1));
    }
    assert_eq!(parts.len(), 2 + 6 + 3 + 3 + 2);
}

#[test]
fn cases_of_two_places_make_two_backends() {
    let is_wanted = |case: &Case| {
        case.op() == Op::MlpIn && case.batch == "prompt of 45" && case.shape.starts_with("GQA 1")
            || case.op() == Op::Logits && case.batch == "prompt of 45" && case.shape == "odd sizes"
    };
    let some: Vec<Case> = cases(|_| true).into_iter().filter(is_wanted).collect();
    let made = Cell::new(0);
    let checks = check_some(&some, &made);
    let texts: Vec<&str> = checks.iter().map(|check| check.case.as_str()).collect();
    let expected = [
        "odd sizes, prompt of 45, values",
        "odd sizes, prompt of 45, samples",
        "GQA 16, head_dim 256, prompt of 45",
    ];
    assert_eq!((texts.as_slice(), made.get()), (expected.as_slice(), 2));
}
