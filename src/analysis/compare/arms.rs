//! The two sides and the noise, by session: what belongs together, and what went on while it was measured.

use std::collections::{BTreeMap, BTreeSet};

use super::environment::{self, Class, Declared, Difference};
use super::result::{Arm, ConditionMeans, NoiseArm};
use super::sample::{Conditions, Sample};
use super::session::{self, Group, SessionId};
use crate::record::{Maybe, Workload};

/// Records by session.
pub(super) struct Arms<'a> {
    pub(super) baseline: Vec<Group<'a>>,
    pub(super) candidate: Vec<Group<'a>>,
    pub(super) noise: Vec<Vec<Group<'a>>>,
}

impl Arms<'_> {
    pub(super) fn workload(&self, key: &str) -> Option<&Workload> {
        let groups = self.baseline.iter().chain(&self.candidate);
        let cells = groups.flat_map(|group| &group.samples).filter_map(|sample| sample.cells.get(key));
        cells.map(|cell| &cell.workload).next()
    }
}

/// Sessions of both sides, and of the noise records that fit them, by batch of one environment.
pub(super) fn arrange<'a>(
    baseline: &'a [Sample],
    candidate: &'a [Sample],
    noise: &'a [Sample],
    declared: &Declared,
    remarks: &mut Vec<String>,
) -> Arms<'a> {
    let baseline_groups = session::group(baseline, remarks);
    let candidate_groups = session::group(candidate, remarks);
    let in_arms: BTreeSet<&SessionId> =
        baseline_groups.iter().chain(&candidate_groups).map(|group| group.id).collect();
    let mut batches: BTreeMap<Vec<(&str, &str)>, Vec<Group<'a>>> = BTreeMap::new();
    for group in session::group(noise, remarks) {
        if in_arms.contains(group.id) {
            remarks.push(format!("noise: {} is part of a side already and counts there", group.id));
            continue;
        }
        let first = group.samples[0];
        match baseline.first().and_then(|reference| environment::foreign_identity(first, reference, declared))
        {
            Some(why) => remarks.push(format!("noise: {} is left out: {why}", first.name)),
            None => batches.entry(environment::batch_key(first)).or_default().push(group),
        }
    }
    Arms { baseline: baseline_groups, candidate: candidate_groups, noise: batches.into_values().collect() }
}

pub(super) fn arm(samples: &[Sample], groups: &[Group<'_>]) -> Arm {
    let mut files: Vec<String> = samples.iter().map(|sample| sample.name.clone()).collect();
    files.sort();
    Arm {
        files,
        sessions: groups.iter().map(|group| group.id.clone()).collect(),
        conditions: condition_means(groups),
    }
}

pub(super) fn noise_arm(batches: &[Vec<Group<'_>>]) -> NoiseArm {
    let samples = batches.iter().flatten().flat_map(|group| &group.samples);
    let mut files: Vec<String> = samples.map(|sample| sample.name.clone()).collect();
    files.sort();
    NoiseArm { files, batches: batches.iter().map(|batch| batch.len() as u32).collect() }
}

fn condition_means(groups: &[Group<'_>]) -> ConditionMeans {
    let all: Vec<&Conditions> = groups
        .iter()
        .flat_map(|group| &group.samples)
        .flat_map(|sample| sample.cells.values())
        .filter(|cell| cell.absent.is_none())
        .map(|cell| &cell.conditions)
        .collect();
    let window_s: f64 = all.iter().map(|conditions| conditions.window_s).sum();
    let sum = |pick: &dyn Fn(&Conditions) -> Maybe<f64>| -> Maybe<f64> {
        let mut sum = Maybe::missing("no_run");
        for conditions in &all {
            match pick(conditions) {
                Maybe::Value(value) => sum = Maybe::Value(sum.into_value().unwrap_or(0.0) + value),
                missing => return missing,
            }
        }
        sum
    };
    let over_time = |pick: fn(&Conditions) -> &Maybe<f64>| {
        sum(&|conditions| pick(conditions).clone().map(|value| value * conditions.window_s))
            .map(|sum| sum / window_s)
    };
    ConditionMeans {
        window_s,
        power_cap_s: sum(&|conditions| conditions.power_cap_s.clone()),
        thermal_s: sum(&|conditions| conditions.thermal_s.clone()),
        power_brake_s: sum(&|conditions| conditions.power_brake_s.clone()),
        temperature_c: over_time(|conditions| &conditions.temperature_c),
        foreign_share: over_time(|conditions| &conditions.foreign_share),
        steal_share: over_time(|conditions| &conditions.steal_share),
    }
}

/// What about the sessions and the declarations a reader should know.
pub(super) fn remark_on_arms(
    arms: &Arms<'_>,
    declared: &Declared,
    environment: &[Difference],
    remarks: &mut Vec<String>,
) {
    let in_candidate: BTreeSet<&SessionId> = arms.candidate.iter().map(|group| group.id).collect();
    for group in arms.baseline.iter().filter(|group| in_candidate.contains(group.id)) {
        remarks.push(format!("{} is on both sides: nothing was loaded anew between them", group.id));
    }
    let groups = || arms.baseline.iter().chain(&arms.candidate).chain(arms.noise.iter().flatten());
    let is_declared = |group: &&Group<'_>| matches!(group.id, SessionId::Declared { .. });
    let sessions = groups().filter(is_declared).map(|group| group.id).collect::<BTreeSet<_>>().len();
    let boots: BTreeSet<_> = groups()
        .filter(is_declared)
        .flat_map(|group| group.samples.iter().map(|sample| &sample.boot))
        .collect();
    if sessions > boots.len() {
        remarks.push(format!(
            "{sessions} sessions are declared (--session), from {} of boot and driver load",
            match boots.len() {
                1 => "one pair".to_owned(),
                count => format!("{count} pairs"),
            }
        ));
    }
    if groups().any(|group| *group.id == SessionId::Unknown) {
        remarks.push("records without a boot id count as one session".to_owned());
    }
    for key in &declared.allow_env {
        let of_identity = |line: &&Difference| line.class == Class::Identity && line.field == *key;
        if environment.iter().any(|line| of_identity(&line)) {
            remarks.push(format!("--allow-env {key}: an identity cannot be allowed"));
        } else if !environment.iter().any(|line| line.allowed && line.is_named(key)) {
            remarks.push(format!("--allow-env {key}: nothing suspicious changed there"));
        }
    }
}
