//! The numbers behind NVML's fields. NVIDIA renumbered those of 251 to 273 with driver 580.82, and a driver answers the
//! wrong number without an error; so a field has a name here, and its number depends on the driver.

/// A field whose number may depend on the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Power at this moment, mW.
    PowerInstant,
    /// Time held down by the software power cap since the driver was loaded, ns.
    SoftwarePowerCap,
    /// By the software's thermal limit, ns.
    SoftwareThermal,
    /// By the hardware's thermal limit, ns.
    HardwareThermal,
    /// By an external power brake, ns.
    HardwarePowerBrake,
    /// By other GPUs of a group that keeps its clocks alike, ns.
    SyncBoost,
}

/// How a driver numbers the fields from 251 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// Before 580.82.
    Old,
    /// 580.82 and later.
    New,
    /// The driver's version is not understood.
    Unknown,
}

impl Numbering {
    /// Of a driver version such as `580.82.07`.
    pub fn of(driver_version: &str) -> Self {
        let mut parts = driver_version.trim().split('.').map(str::parse::<u32>);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (580, 82) => Numbering::New,
            (Some(Ok(_)), Some(Ok(_))) => Numbering::Old,
            _ => Numbering::Unknown,
        }
    }

    /// The number of `field`; `None` where it cannot be known.
    pub fn id(self, field: Field) -> Option<u32> {
        let moved = |old: u32, new: u32| match self {
            Numbering::Old => Some(old),
            Numbering::New => Some(new),
            Numbering::Unknown => None,
        };
        match field {
            Field::PowerInstant => Some(186),
            Field::SoftwarePowerCap => Some(74),
            Field::SyncBoost => Some(76),
            Field::SoftwareThermal => moved(251, 269),
            Field::HardwareThermal => moved(252, 270),
            Field::HardwarePowerBrake => moved(253, 271),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_change_with_580_82_and_are_unknown_for_an_unknown_driver() {
        let thermal = |version| Numbering::of(version).id(Field::SoftwareThermal);
        for (version, id) in [
            ("570.86.15", Some(251)),
            ("580.65.06", Some(251)),
            ("580.82.07", Some(269)),
            ("580.95", Some(269)),
            ("590.44.01", Some(269)),
            ("", None),
            ("next", None),
            ("600", None),
        ] {
            assert_eq!(thermal(version), id, "{version}");
        }
        assert_eq!(Numbering::Unknown.id(Field::PowerInstant), Some(186));
    }
}
