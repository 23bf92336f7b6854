//! Findings about how the GPUs are set up, and about what of it could not be read.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Section;
use crate::machine::{Roots, kernel_log_access};
use crate::meter::nvml;
use crate::record::Maybe;
use crate::record::environment::GpuSetup;
use crate::record::machine::{Gpu, Machine};

pub(super) fn look(machine: &Machine, roots: &Roots) -> Section {
    let mut section = Section::new("environment");
    for gpu in &machine.gpus {
        described(&mut section, gpu);
    }
    let what = "kernel log (GPU faults, driver load)";
    match kernel_log_access(roots) {
        Ok(()) => section.ok(what, "readable"),
        Err("permission") => section.warn(
            what,
            "not readable: /dev/kmsg",
            "sudo sysctl kernel.dmesg_restrict=0 (until the next boot), or run as root",
        ),
        Err(reason) => section.missing(
            what,
            format!("/dev/kmsg: {}", reason.replace('_', " ")),
            Some("in a container, start it with --device /dev/kmsg --cap-add SYSLOG"),
        ),
    }
    section
}

fn described(section: &mut Section, gpu: &Gpu) {
    let name = format!("cuda:{}", gpu.index);
    let setup = match &gpu.setup {
        Maybe::Value(setup) => setup,
        Maybe::Missing(missing) => {
            let text = format!("NVML does not show it: {}", missing.missing.replace('_', " "));
            return section.missing(format!("{name} setup"), text, remedy(&missing.missing).as_deref());
        }
    };
    states(section, &name, setup);
    for (reason, items) in unread(setup) {
        let text = format!("{}: {}", reason.replace('_', " "), items.join(", "));
        section.missing(format!("{name} not read"), text, remedy(&reason).as_deref());
    }
}

/// States that slow a GPU down, or will change at the next reset.
fn states(section: &mut Section, name: &str, setup: &GpuSetup) {
    let index = name.trim_start_matches("cuda:");
    let address = setup.pci_address.value().map_or(index, String::as_str);
    let mut warn = |what: &str, value: String, remedy: String| {
        section.warn(format!("{name} {what}"), value, remedy);
    };
    let limits = &setup.power_limits;
    if let (Some(&now), Some(&default)) = (limits.enforced_w.value(), limits.default_w.value())
        && now < default
    {
        let remedy =
            format!("sudo nvidia-smi -i {address} -pl {default:.0}, or name the limit in the report");
        warn("power limit", format!("{now} W, below the default of {default} W"), remedy);
    }
    if setup.persistence_mode == Maybe::Value(false) {
        let remedy = format!("sudo nvidia-smi -i {address} -pm 1");
        warn("persistence mode", "off: each first use loads the driver's state anew".to_owned(), remedy);
    }
    if let (Some(now), Some(next)) = (setup.ecc_enabled.value(), setup.ecc_pending.value())
        && now != next
    {
        let remedy = format!("sudo nvidia-smi -i {address} --gpu-reset, or reboot");
        warn("error correction", "changes at the next reset".to_owned(), remedy);
    }
    if setup.mig_enabled == Maybe::Value(true) {
        let remedy = format!("sudo nvidia-smi -i {address} -mig 0 to measure the whole GPU");
        warn("partitioning", "on: others may use parts of this GPU".to_owned(), remedy);
    }
}

/// Reason code → the names of what it keeps from us.
fn unread(setup: &GpuSetup) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    if let Ok(value) = serde_json::to_value(setup) {
        collect(&value, "", &mut found);
    }
    found
}

fn collect(value: &Value, name: &str, found: &mut BTreeMap<String, Vec<String>>) {
    let Some(fields) = value.as_object() else { return };
    if let Some(reason) = fields.get("missing").and_then(Value::as_str) {
        found.entry(reason.to_owned()).or_default().push(name.to_owned());
        return;
    }
    for (field, inner) in fields {
        let inner_name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
        collect(inner, &inner_name, found);
    }
}

/// None where the GPU simply has no such thing.
fn remedy(reason: &str) -> Option<String> {
    match reason {
        "not_supported" => None,
        "function_not_found" => Some("a newer driver's libnvidia-ml.so.1 tells it".to_owned()),
        other => nvml::remedy(other).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::machine::tests::described as machine_without_nvml;

    fn gpu(setup: Maybe<GpuSetup>) -> Gpu {
        let missing = || Maybe::missing("not_found");
        Gpu {
            index: 2,
            name: missing(),
            uuid: missing(),
            memory_bytes: Maybe::missing("not_found"),
            compute_capability: missing(),
            setup,
        }
    }

    /// A board that answers nothing for lack of permission.
    fn closed() -> GpuSetup {
        let text = r#"{"missing":"no_permission"}"#;
        let fields = [
            "serial",
            "board_part_number",
            "pci_address",
            "pci_device_id",
            "pci_subsystem_id",
            "cuda_cores",
            "memory_bus_bits",
            "gsp_firmware",
            "gsp_firmware_enabled",
            "vbios",
            "inforom_image",
            "inforom_checksum",
            "ecc_enabled",
            "ecc_pending",
            "persistence_mode",
            "compute_mode",
            "mig_enabled",
            "mig_pending",
            "virtualization",
            "confidential_compute",
            "max_pcie_generation",
            "max_pcie_width",
            "numa_node",
        ];
        let block = |names: &[&str]| {
            let inner: Vec<String> = names.iter().map(|name| format!("\"{name}\":{text}")).collect();
            format!("{{{}}}", inner.join(","))
        };
        let limits = block(&["enforced_w", "requested_w", "default_w", "min_w", "max_w"]);
        let clocks = block(&["sm_mhz", "memory_mhz", "graphics_mhz"]);
        let flat = block(&fields);
        let whole =
            format!("{},\"power_limits\":{limits},\"max_clocks\":{clocks}}}", &flat[..flat.len() - 1]);
        serde_json::from_str(&whole).unwrap()
    }

    fn found(setup: Maybe<GpuSetup>) -> Section {
        let roots = Roots::under("/nonexistent");
        let machine = Machine { gpus: vec![gpu(setup)], ..machine_without_nvml(&roots) };
        look(&machine, &roots)
    }

    #[test]
    fn what_could_not_be_read_is_one_finding_for_each_reason() {
        let section = found(Maybe::Value(GpuSetup { vbios: Maybe::missing("not_supported"), ..closed() }));
        let values: Vec<&str> = section.findings.iter().map(|finding| finding.value.as_str()).collect();
        assert!(values[0].starts_with("no permission: ") && values[0].contains("power_limits.default_w"));
        assert!(section.findings[0].remedy.as_deref().unwrap().contains("run as root"));
        assert_eq!((values[1], &section.findings[1].remedy), ("not supported: vbios", &None));
        assert_eq!(values[2], "/dev/kmsg: not found");
    }

    #[test]
    fn a_gpu_that_nvml_does_not_show_is_one_finding() {
        let section = found(Maybe::missing("no_nvml"));
        assert_eq!(section.findings[0].what, "cuda:2 setup");
        assert!(section.findings[0].remedy.as_deref().unwrap().contains("install the NVIDIA driver"));
    }

    #[test]
    fn states_that_disturb_come_with_their_command() {
        let mut setup = closed();
        setup.power_limits.enforced_w = Maybe::Value(500.0);
        setup.power_limits.default_w = Maybe::Value(700.0);
        setup.persistence_mode = Maybe::Value(false);
        (setup.ecc_enabled, setup.ecc_pending) = (Maybe::Value(true), Maybe::Value(false));
        setup.mig_enabled = Maybe::Value(true);
        let section = found(Maybe::Value(setup));
        let warnings = section.findings.iter().filter(|finding| finding.status == Status::Warn);
        let remedies: Vec<&str> = warnings.filter_map(|finding| finding.remedy.as_deref()).collect();
        assert_eq!(remedies.len(), 4);
        assert!(remedies[0].starts_with("sudo nvidia-smi -i 2 -pl 700"), "{remedies:?}");
    }
}
