use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::bus::ECAM_BYTES_PER_BUS;
use super::*;

const ECAM: u64 = 0xe000_0000;
const WINDOW: Range<u64> = 0xc000_0000..0xc100_0000;
const HIGH: Range<u64> = 0x80_0000_0000..0x81_0000_0000;

/// Remembers what reached it; reads as the low byte of the offset.
#[derive(Default)]
struct Probe {
    bars: Vec<BarSpec>,
    capabilities: Vec<Capability>,
    msix: Option<Arc<Msix>>,
    log: Mutex<Vec<String>>,
}

impl PciFunction for Probe {
    fn name(&self) -> &str {
        "probe"
    }

    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 9,
            class: 0x0a_0b_0c,
            subsystem_vendor: 0x1111,
            subsystem: 0x2222,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        self.bars.clone()
    }

    fn capabilities(&self) -> Vec<Capability> {
        self.capabilities.clone()
    }

    fn msix(&self) -> Option<Arc<Msix>> {
        self.msix.clone()
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        self.log
            .lock()
            .unwrap()
            .push(format!("read {bar}+{offset:#x} x{}", data.len()));
        data[0] = offset as u8;
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        self.log
            .lock()
            .unwrap()
            .push(format!("write {bar}+{offset:#x} {data:x?}"));
    }

    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        self.log
            .lock()
            .unwrap()
            .push(format!("moved {bar} {address:x?}"));
    }
}

fn bar(index: usize, kind: BarKind, size: u64) -> BarSpec {
    BarSpec {
        index,
        kind,
        size,
        prefetchable: false,
    }
}

fn bus() -> PciBus {
    PciBus::new(PciBusSpec {
        ecam: ECAM,
        mmio32: WINDOW,
        mmio64: Some(HIGH),
    })
}

fn with_bars(bars: &[BarSpec]) -> (PciBus, Arc<Probe>) {
    let bus = bus();
    let probe = Arc::new(Probe {
        bars: bars.to_vec(),
        ..Probe::default()
    });
    assert_eq!(bus.add(Some(3), probe.clone()), Ok(3));
    (bus, probe)
}

fn at(device: u64, register: u64) -> u64 {
    ECAM + device * 0x8000 + register
}

fn read(bus: &PciBus, address: u64, len: usize) -> Option<u64> {
    let mut data = [0; 8];
    bus.mmio_read(address, &mut data[..len])
        .then(|| u64::from_le_bytes(data))
}

fn write(bus: &PciBus, address: u64, len: usize, value: u64) -> bool {
    bus.mmio_write(address, &value.to_le_bytes()[..len])
}

impl Probe {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

#[test]
fn the_header_says_who_it_is_and_cannot_be_changed() {
    let (bus, _) = with_bars(&[]);
    for pass in 0..2 {
        assert_eq!(read(&bus, at(3, 0), 4), Some(0x5678_1234), "pass {pass}");
        assert_eq!(read(&bus, at(3, 8), 4), Some(0x0a0b_0c09));
        assert_eq!(read(&bus, at(3, 0x2c), 4), Some(0x2222_1111));
        assert_eq!(read(&bus, at(3, 0x3d), 1), Some(0), "no INTx pin");
        for register in (0..0x40).step_by(4) {
            write(&bus, at(3, register), 4, 0xffff_ffff);
        }
        assert_eq!(
            read(&bus, at(3, 4), 2),
            Some(0x406),
            "memory, master, INTx off"
        );
    }
}

#[test]
fn absent_functions_read_ones_and_take_writes() {
    let (bus, _) = with_bars(&[]);
    assert_eq!(read(&bus, at(4, 0), 4), Some(0xffff_ffff));
    assert_eq!(read(&bus, at(3, 0x1000), 2), Some(0xffff), "function 1");
    assert!(write(&bus, at(4, 4), 2, 7));
    assert_eq!(
        read(&bus, at(3, 0x100), 4),
        Some(0),
        "no extended capabilities"
    );
    assert_eq!(read(&bus, at(3, 0xfff), 1), Some(0));
    assert_eq!(read(&bus, ECAM + ECAM_BYTES_PER_BUS, 4), None);
    assert_eq!(
        read(&bus, ECAM + ECAM_BYTES_PER_BUS - 2, 4),
        None,
        "across the end"
    );
    assert_eq!(read(&bus, ECAM - 1, 1), None);
    assert_eq!(read(&bus, u64::MAX, 8), None);
}

#[test]
fn both_mechanisms_reach_the_same_registers() {
    let (bus, _) = with_bars(&[bar(0, BarKind::Memory32, 0x1000)]);
    let select = |register: u32| {
        assert!(bus.io_write(0xcf8, &(0x8000_1800 | register).to_le_bytes()));
    };
    let mut data = [0; 4];
    select(0);
    assert!(bus.io_read(0xcfc, &mut data));
    assert_eq!(u32::from_le_bytes(data), 0x5678_1234);
    assert!(bus.io_read(0xcfe, &mut data[..2]));
    assert_eq!(data[..2], [0x78, 0x56]);
    select(4);
    assert!(bus.io_write(0xcfc, &[2, 0]));
    assert_eq!(read(&bus, at(3, 4), 2), Some(2));
    assert!(bus.io_read(0xcf8, &mut data));
    assert_eq!(u32::from_le_bytes(data), 0x8000_1804);
}

#[test]
fn ports_answer_only_to_what_is_theirs() {
    let (bus, _) = with_bars(&[]);
    let mut data = [0; 4];
    for (port, len) in [(0xcf8, 1), (0xcf9, 1), (0xcfe, 4), (0xd00, 1), (0xcf7, 1)] {
        assert!(!bus.io_read(port, &mut data[..len]), "{port:#x}");
        assert!(!bus.io_write(port, &data[..len]), "{port:#x}");
    }
    // Not enabled, or another bus: ours, but nobody is there.
    for address in [0x0000_1800u32, 0x8001_1800] {
        assert!(bus.io_write(0xcf8, &address.to_le_bytes()));
        assert!(bus.io_read(0xcfc, &mut data));
        assert_eq!(data, [0xff; 4]);
    }
}

#[test]
fn sizing_tells_size_and_type() {
    let (bus, probe) = with_bars(&[
        BarSpec {
            index: 0,
            kind: BarKind::Memory32,
            size: 0x2_0000,
            prefetchable: true,
        },
        bar(2, BarKind::Memory64, 0x2_0000_0000_u64 >> 1),
    ]);
    let before = read(&bus, at(3, 0x10), 4).unwrap();
    assert_eq!(before & 0xf, 0b1000);
    assert!(WINDOW.contains(&(before & !0xf)));
    write(&bus, at(3, 0x10), 4, 0xffff_ffff);
    assert_eq!(read(&bus, at(3, 0x10), 4), Some(0xfffe_0008));
    write(&bus, at(3, 0x10), 4, before);
    assert_eq!(read(&bus, at(3, 0x10), 4), Some(before));

    let high = read(&bus, at(3, 0x18), 8).unwrap();
    assert_eq!(high, HIGH.start | 0b100);
    write(&bus, at(3, 0x18), 4, 0xffff_ffff);
    write(&bus, at(3, 0x1c), 4, 0xffff_ffff);
    assert_eq!(read(&bus, at(3, 0x18), 8), Some(0xffff_ffff_0000_0004));
    write(&bus, at(3, 0x14), 4, 0xffff_ffff);
    assert_eq!(read(&bus, at(3, 0x14), 4), Some(0), "no BAR there");
    assert!(probe.take().is_empty(), "nothing was decoded");
}

#[test]
fn a_bar_answers_where_it_is_and_nowhere_else() {
    let (bus, probe) = with_bars(&[bar(0, BarKind::Memory32, 0x1000)]);
    let base = WINDOW.start;
    assert_eq!(read(&bus, base, 4), None, "not decoded at start");
    write(&bus, at(3, 4), 2, 2);
    assert_eq!(read(&bus, base + 0x12, 1), Some(0x12));
    assert!(write(&bus, base + 0xffc, 4, 1));
    assert_eq!(read(&bus, base + 0xffe, 4), None, "across the end");
    assert_eq!(read(&bus, base + 0x1000, 1), None);
    let moved = base + 0x10_0000;
    write(&bus, at(3, 0x10), 4, moved);
    assert_eq!(read(&bus, base, 1), None);
    assert_eq!(read(&bus, moved + 1, 1), Some(1));
    write(&bus, at(3, 4), 2, 2);
    write(&bus, at(3, 4), 2, 0);
    assert_eq!(read(&bus, moved, 1), None);
    assert_eq!(
        probe.take(),
        [
            "moved 0 Some(c0000000)",
            "read 0+0x12 x1",
            "write 0+0xffc [1, 0, 0, 0]",
            "moved 0 Some(c0100000)",
            "read 0+0x1 x1",
            "moved 0 None",
        ]
    );
}

#[test]
fn a_bar_outside_the_windows_is_not_decoded() {
    let (bus, probe) = with_bars(&[
        bar(0, BarKind::Memory32, 0x1000),
        bar(2, BarKind::Memory64, 0x1000),
    ]);
    write(&bus, at(3, 4), 2, 2);
    probe.take();
    for address in [
        0x10_0000,
        WINDOW.start - 0x1000,
        WINDOW.end,
        ECAM,
        0xffff_f000,
    ] {
        write(&bus, at(3, 0x10), 4, address);
        assert_eq!(read(&bus, address & !0xfff, 1).is_none(), address != ECAM);
        write(&bus, at(3, 0x10), 4, WINDOW.start);
    }
    for address in [0x1_0000_0000, HIGH.end, u64::MAX] {
        write(&bus, at(3, 0x18), 8, address);
        assert_eq!(read(&bus, address & !0xfff, 1), None, "{address:#x}");
    }
}

#[test]
fn functions_get_numbers_and_windows_run_out_with_errors() {
    let bus = bus();
    assert_eq!(bus.add(None, Arc::new(HostBridge)), Ok(0));
    assert_eq!(bus.add(Some(2), Arc::new(HostBridge)), Ok(2));
    assert_eq!(bus.add(None, Arc::new(HostBridge)), Ok(1));
    assert_eq!(bus.add(None, Arc::new(HostBridge)), Ok(3));
    let function = "host-bridge".to_owned();
    assert_eq!(
        bus.add(Some(2), Arc::new(HostBridge)),
        Err(PciError::Slot {
            device: 2,
            function: function.clone()
        })
    );
    assert!(bus.add(Some(32), Arc::new(HostBridge)).is_err());
    for device in 4..32 {
        assert_eq!(bus.add(None, Arc::new(HostBridge)), Ok(device));
    }
    assert_eq!(
        bus.add(None, Arc::new(HostBridge)),
        Err(PciError::Full(function))
    );

    let bus = self::bus();
    let huge = |size| {
        Arc::new(Probe {
            bars: vec![bar(0, BarKind::Memory32, size)],
            ..Probe::default()
        })
    };
    let refused = Err(PciError::Window {
        function: "probe".into(),
        bar: 0,
        size: 0x200_0000,
    });
    assert_eq!(bus.add(None, huge(0x200_0000)), refused);
    assert_eq!(bus.add(None, huge(0x100_0000)), Ok(0));
    assert!(matches!(
        bus.add(None, huge(0x10)),
        Err(PciError::Window { .. })
    ));
}

#[test]
fn impossible_bars_are_refused() {
    let bus = bus();
    for bars in [
        vec![bar(6, BarKind::Memory32, 0x1000)],
        vec![bar(5, BarKind::Memory64, 0x1000)],
        vec![bar(0, BarKind::Memory32, 0x1001)],
        vec![bar(0, BarKind::Memory32, 8)],
        vec![bar(0, BarKind::Memory32, 1 << 32)],
        vec![
            bar(0, BarKind::Memory64, 0x1000),
            bar(1, BarKind::Memory32, 0x1000),
        ],
    ] {
        let outcome = bus.add(
            None,
            Arc::new(Probe {
                bars,
                ..Probe::default()
            }),
        );
        assert!(matches!(outcome, Err(PciError::Bar { .. })), "{outcome:?}");
    }
}

#[test]
fn capabilities_form_a_list_with_their_own_write_masks() {
    let bus = bus();
    let capabilities = vec![
        Capability::read_only(9, vec![1, 2, 3]),
        Capability {
            id: 5,
            body: vec![0; 6],
            writable: vec![0, 0xf0],
            bar_window: false,
        },
    ];
    let probe = Probe {
        capabilities,
        ..Probe::default()
    };
    assert_eq!(bus.add(Some(3), Arc::new(probe)), Ok(3));
    assert_eq!(read(&bus, at(3, 6), 2), Some(0x10));
    assert_eq!(read(&bus, at(3, 0x34), 1), Some(0x40));
    write(&bus, at(3, 0x40), 8, u64::MAX);
    assert_eq!(read(&bus, at(3, 0x40), 8), Some(0x03_0201_4809));
    write(&bus, at(3, 0x48), 8, u64::MAX);
    assert_eq!(read(&bus, at(3, 0x48), 8), Some(0xf000_0005));

    let capabilities = vec![Capability::read_only(9, vec![0; 200])];
    let probe = Probe {
        capabilities,
        ..Probe::default()
    };
    assert_eq!(
        bus.add(None, Arc::new(probe)),
        Err(PciError::Capabilities("probe".into()))
    );
}

#[test]
fn msix_structures_must_fit_their_bar() {
    use super::msix::MsixSpec;
    let (_, routes) = crate::irq::fake::FakeHypervisor::new();
    for (table, pba, bar_index) in [(0xff8, 0, 0), (0, 0xffc, 0), (4, 0x800, 0), (0, 0x800, 1)] {
        let spec = MsixSpec {
            vectors: 2,
            bar: bar_index,
            table,
            pba,
        };
        let probe = Probe {
            bars: vec![bar(0, BarKind::Memory32, 0x1000)],
            msix: Some(Msix::new(spec, Arc::clone(&routes))),
            ..Probe::default()
        };
        assert_eq!(
            bus().add(None, Arc::new(probe)),
            Err(PciError::Msix("probe".into()))
        );
    }
}
