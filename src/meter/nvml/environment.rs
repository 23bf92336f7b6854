//! What NVML says of a GPU beside its power: how it is set up, and what changes while it works. Each answer stands
//! alone: one that a driver refuses leaves the others as they are.

use nvml_wrapper::enum_wrappers::device::{
    Clock as ClockKind, ComputeMode, EccCounter, GpuVirtualizationMode, MemoryError, RetirementCause,
};
use nvml_wrapper::enum_wrappers::nv_link::ErrorCounter;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;

use super::{Field, Gpu, Library, raw};
use crate::meter::samples::Reason;
use crate::record::Maybe;
use crate::record::environment::{
    EccErrors, GpuClocks, GpuProcess, GpuReading, GpuSetup, HeldDown, MemoryRepairs, PowerLimits,
};

/// No GPU has more links.
const MOST_NVLINKS: u32 = 18;
/// Longer names of programs are cut.
const NAME_BYTES: usize = 1024;

/// A GPU that can be described.
pub struct Described<'a> {
    library: &'a Library,
    gpu: Gpu,
}

impl Library {
    /// Release branch of the driver, such as `r580_00`.
    ///
    /// # Errors
    /// Reason code.
    pub fn driver_branch(&self) -> Result<String, Reason> {
        raw::driver_branch(self.nvml)
    }

    /// Version of this library.
    ///
    /// # Errors
    /// Reason code.
    pub fn version(&self) -> Result<String, Reason> {
        self.nvml.sys_nvml_version().map_err(|error| raw::reason(&error))
    }

    /// The GPU of this UUID.
    ///
    /// # Errors
    /// Reason code.
    pub fn described(&self, uuid: &str) -> Result<Described<'_>, Reason> {
        let device = self.nvml.device_by_uuid(uuid).map_err(|error| raw::reason(&error))?;
        Ok(Described { library: self, gpu: Gpu { device, numbering: self.numbering(), scope: None } })
    }
}

impl Described<'_> {
    /// Where it sits, such as `00000000:1B:00.0`.
    ///
    /// # Errors
    /// Reason code.
    pub fn pci_address(&self) -> Result<String, Reason> {
        self.gpu.device.pci_info().map(|pci| pci.bus_id).map_err(|error| raw::reason(&error))
    }

    /// How it is set up.
    pub fn setup(&self) -> GpuSetup {
        let device = &self.gpu.device;
        let pci = device.pci_info();
        let ecc = device.is_ecc_enabled();
        let mig = device.mig_mode();
        GpuSetup {
            serial: answer(device.serial()),
            board_part_number: answer(device.board_part_number()),
            pci_address: part(&pci, |pci| pci.bus_id.clone()),
            pci_device_id: part(&pci, |pci| format!("{:#010x}", pci.pci_device_id)),
            pci_subsystem_id: match &pci {
                Ok(pci) => pci.pci_sub_system_id.map(|id| format!("{id:#010x}")).ok_or("not_known").into(),
                Err(error) => Maybe::missing(raw::reason(error)),
            },
            cuda_cores: answer(device.num_cores()),
            memory_bus_bits: answer(device.memory_bus_width()),
            gsp_firmware: answer(device.gsp_firmware_version()),
            gsp_firmware_enabled: answer(device.gsp_firmware_mode()).map(|mode| mode.enabled),
            vbios: answer(device.vbios_version()),
            inforom_image: answer(device.info_rom_image_version()),
            inforom_checksum: answer(device.config_checksum()).map(|sum| format!("{sum:#010x}")),
            power_limits: self.power_limits(),
            max_clocks: clocks(|kind| device.max_clock_info(kind)),
            ecc_enabled: part(&ecc, |ecc| ecc.currently_enabled),
            ecc_pending: part(&ecc, |ecc| ecc.pending_enabled),
            persistence_mode: answer(device.is_in_persistent_mode()),
            compute_mode: answer(device.compute_mode()).map(|mode| compute_mode(mode).to_owned()),
            mig_enabled: part(&mig, |mig| mig.current != 0),
            mig_pending: part(&mig, |mig| mig.pending != 0),
            virtualization: answer(device.virtualization_mode()).map(|mode| virtualization(mode).to_owned()),
            confidential_compute: answer(device.check_confidential_compute_status()),
            max_pcie_generation: answer(device.max_pcie_link_gen()),
            max_pcie_width: answer(device.max_pcie_link_width()),
            numa_node: answer(device.numa_node_id()),
        }
    }

    /// What it is like at this moment. The kernel's log is not NVML's: `xids` is left for who reads that.
    pub fn reading(&self) -> GpuReading {
        let device = &self.gpu.device;
        let held = |field: Field| self.gpu.time_ns(field).into();
        GpuReading {
            clocks: clocks(|kind| device.clock_info(kind)),
            performance_state: self.performance_state().into(),
            clock_reasons_mask: raw::clock_reasons(device).into(),
            clock_events: HeldDown {
                software_power_cap_ns: held(Field::SoftwarePowerCap),
                software_thermal_ns: held(Field::SoftwareThermal),
                hardware_thermal_ns: held(Field::HardwareThermal),
                hardware_power_brake_ns: held(Field::HardwarePowerBrake),
                sync_boost_ns: held(Field::SyncBoost),
            },
            ecc: self.ecc_errors(),
            pages: self.memory_repairs(),
            pcie_generation: answer(device.current_pcie_link_gen()),
            pcie_width: answer(device.current_pcie_link_width()),
            pcie_replays: answer(device.pcie_replay_counter()),
            nvlinks_active: self.active_nvlinks().map(|links| links.len() as u32).into(),
            nvlink_errors: self.nvlink_errors().into(),
            processes: self.processes().into(),
            xids: Maybe::missing("not_read"),
        }
    }

    fn power_limits(&self) -> PowerLimits {
        let device = &self.gpu.device;
        let watts = |limit_mw: Result<u32, NvmlError>| answer(limit_mw).map(|mw| f64::from(mw) / 1e3);
        let range = device.power_management_limit_constraints();
        PowerLimits {
            enforced_w: watts(device.enforced_power_limit()),
            requested_w: watts(device.power_management_limit()),
            default_w: watts(device.power_management_limit_default()),
            min_w: part(&range, |range| f64::from(range.min_limit) / 1e3),
            max_w: part(&range, |range| f64::from(range.max_limit) / 1e3),
        }
    }

    fn performance_state(&self) -> Result<u32, Reason> {
        match self.gpu.device.performance_state() {
            Ok(state) if state.as_c() < 16 => Ok(state.as_c()),
            Ok(_) => Err("not_known".to_owned()),
            Err(error) => Err(raw::reason(&error)),
        }
    }

    fn ecc_errors(&self) -> EccErrors {
        let count = |kind, counter| answer(self.gpu.device.total_ecc_errors(kind, counter));
        EccErrors {
            corrected: count(MemoryError::Corrected, EccCounter::Volatile),
            uncorrected: count(MemoryError::Uncorrected, EccCounter::Volatile),
            lifetime_corrected: count(MemoryError::Corrected, EccCounter::Aggregate),
            lifetime_uncorrected: count(MemoryError::Uncorrected, EccCounter::Aggregate),
        }
    }

    fn memory_repairs(&self) -> MemoryRepairs {
        let device = &self.gpu.device;
        let retired = |cause| answer(device.retired_pages(cause)).map(|pages| pages.len() as u32);
        let rows = raw::remapped_rows(device);
        let rows = rows.as_ref().map_err(Clone::clone);
        MemoryRepairs {
            retired_corrected: retired(RetirementCause::MultipleSingleBitEccErrors),
            retired_uncorrected: retired(RetirementCause::DoubleBitEccError),
            retirement_pending: answer(device.are_pages_pending_retired()),
            remapped_rows_corrected: rows.clone().map(|rows| rows.corrected).into(),
            remapped_rows_uncorrected: rows.clone().map(|rows| rows.uncorrected).into(),
            remap_pending: rows.clone().map(|rows| rows.is_pending).into(),
            remap_failed: rows.map(|rows| rows.has_failed).into(),
        }
    }

    /// Links that are up. A number beyond the GPU's last link is an invalid argument.
    fn active_nvlinks(&self) -> Result<Vec<u32>, Reason> {
        let mut active = Vec::new();
        for link in 0..MOST_NVLINKS {
            match self.gpu.device.link_wrapper_for(link).is_active() {
                Ok(true) => active.push(link),
                Ok(false) => {}
                Err(NvmlError::InvalidArg) if link > 0 => break,
                Err(error) => return Err(raw::reason(&error)),
            }
        }
        Ok(active)
    }

    /// All counters of all links, or none: a sum of some would change with what a driver supports.
    fn nvlink_errors(&self) -> Result<u64, Reason> {
        let kinds = [ErrorCounter::DlReplay, ErrorCounter::DlRecovery, ErrorCounter::DlCrcFlit];
        let mut errors = 0_u64;
        for link in self.active_nvlinks()? {
            let link = self.gpu.device.link_wrapper_for(link);
            for kind in &kinds {
                let count = link.error_counter(*kind).map_err(|error| raw::reason(&error))?;
                errors = errors.saturating_add(count);
            }
        }
        Ok(errors)
    }

    /// Sorted by number. Drivers without MPS or graphics lists have no such processes.
    fn processes(&self) -> Result<Vec<GpuProcess>, Reason> {
        let device = &self.gpu.device;
        let compute = device.running_compute_processes().map_err(|error| raw::reason(&error))?;
        let kinds = [
            ("compute", compute),
            ("graphics", device.running_graphics_processes().unwrap_or_default()),
            ("mps", device.mps_running_compute_processes().unwrap_or_default()),
        ];
        let mut processes: Vec<GpuProcess> = kinds
            .iter()
            .flat_map(|(kind, list)| list.iter().map(|process| self.process(kind, process)))
            .collect();
        processes.sort_by_key(|process| process.pid);
        Ok(processes)
    }

    fn process(&self, kind: &str, process: &ProcessInfo) -> GpuProcess {
        let pid = process.pid;
        let name = self.library.nvml.sys_process_name(pid, NAME_BYTES);
        let name = name.map_err(|error| raw::reason(&error));
        GpuProcess {
            pid,
            name: name.and_then(|name| file_name(&name)).into(),
            kind: kind.to_owned(),
            own: pid == std::process::id(),
        }
    }
}

/// Of a command line: arguments may hold anything.
fn file_name(command: &str) -> Result<String, Reason> {
    let program = command.split_whitespace().next().unwrap_or_default();
    match program.rsplit('/').next() {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err("empty".to_owned()),
    }
}

fn answer<T>(result: Result<T, NvmlError>) -> Maybe<T> {
    result.map_err(|error| raw::reason(&error)).into()
}

fn part<T, U>(result: &Result<T, NvmlError>, take: impl FnOnce(&T) -> U) -> Maybe<U> {
    result.as_ref().map(take).map_err(raw::reason).into()
}

fn clocks(ask: impl Fn(ClockKind) -> Result<u32, NvmlError>) -> GpuClocks {
    GpuClocks {
        sm_mhz: answer(ask(ClockKind::SM)),
        memory_mhz: answer(ask(ClockKind::Memory)),
        graphics_mhz: answer(ask(ClockKind::Graphics)),
    }
}

fn compute_mode(mode: ComputeMode) -> &'static str {
    match mode {
        ComputeMode::Default => "default",
        ComputeMode::ExclusiveThread => "exclusive_thread",
        ComputeMode::Prohibited => "prohibited",
        ComputeMode::ExclusiveProcess => "exclusive_process",
    }
}

fn virtualization(mode: GpuVirtualizationMode) -> &'static str {
    match mode {
        GpuVirtualizationMode::Bare => "none",
        GpuVirtualizationMode::PassThrough => "passthrough",
        GpuVirtualizationMode::Vgpu => "vgpu",
        GpuVirtualizationMode::HostVgpu => "host_vgpu",
        GpuVirtualizationMode::HostVsga => "host_vsga",
    }
}
