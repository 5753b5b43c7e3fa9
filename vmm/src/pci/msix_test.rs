use std::sync::Arc;

use super::msix::{CONTROL_ENABLE, CONTROL_MASK_ALL, Msix, MsixSpec};
use super::{BarKind, BarSpec, Identity, PciBus, PciBusSpec, PciFunction};
use crate::irq::fake::FakeHypervisor;

const TABLE: u64 = 0x100;
const PBA: u64 = 0x800;
const VECTORS: u16 = 70;

struct Fixture {
    hypervisor: Arc<FakeHypervisor>,
    msix: Arc<Msix>,
}

fn fixture() -> Fixture {
    let (hypervisor, routes) = FakeHypervisor::new();
    let spec = MsixSpec {
        vectors: VECTORS,
        bar: 0,
        table: TABLE as u32,
        pba: PBA as u32,
    };
    Fixture {
        hypervisor,
        msix: Msix::new(spec, routes),
    }
}

impl Fixture {
    /// Message with data `data` for `vector`, unmasked.
    fn program(&self, vector: u16, data: u32) {
        let at = TABLE + 16 * u64::from(vector);
        self.msix.write(at, &0xfee0_1000u64.to_le_bytes());
        self.msix.write(at + 8, &data.to_le_bytes());
        self.mask(vector, false);
    }

    fn mask(&self, vector: u16, masked: bool) {
        self.msix.write(
            TABLE + 16 * u64::from(vector) + 12,
            &u32::from(masked).to_le_bytes(),
        );
    }

    fn pending(&self, quadword: u64) -> u64 {
        let mut data = [0; 8];
        self.msix.read(PBA + 8 * quadword, &mut data);
        u64::from_le_bytes(data)
    }

    fn delivered(&self) -> Vec<u32> {
        self.hypervisor
            .delivered()
            .iter()
            .map(|message| message.data)
            .collect()
    }

    fn route_calls(&self) -> usize {
        self.hypervisor.state.lock().unwrap().route_calls
    }
}

#[test]
fn an_enabled_unmasked_vector_is_delivered() {
    let f = fixture();
    f.program(3, 0x33);
    f.msix.raise(3);
    assert!(f.delivered().is_empty(), "not enabled");
    f.msix.set_control(CONTROL_ENABLE);
    assert!(
        f.delivered().is_empty(),
        "what came before is lost, not pending"
    );
    f.msix.raise(3);
    assert_eq!(f.delivered(), [0x33]);
    f.msix.raise(VECTORS);
    f.msix.raise(u16::MAX);
    assert!(f.delivered().is_empty());
}

#[test]
fn a_masked_vector_is_pending_and_comes_once_when_unmasked() {
    let f = fixture();
    f.msix.set_control(CONTROL_ENABLE);
    f.program(65, 0x41);
    f.mask(65, true);
    f.msix.raise(65);
    f.msix.raise(65);
    assert!(f.delivered().is_empty());
    assert_eq!((f.pending(0), f.pending(1)), (0, 0b10));
    f.mask(65, false);
    assert_eq!(f.delivered(), [0x41]);
    assert_eq!(f.pending(1), 0);
    f.mask(65, false);
    assert!(f.delivered().is_empty());
}

#[test]
fn a_pending_interrupt_goes_to_the_new_message() {
    let f = fixture();
    f.msix.set_control(CONTROL_ENABLE);
    f.program(0, 0x10);
    f.mask(0, true);
    f.msix.raise(0);
    f.program(0, 0x20);
    assert_eq!(f.delivered(), [0x20]);
}

#[test]
fn the_function_mask_holds_all_back() {
    let f = fixture();
    f.msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
    f.program(1, 0x11);
    f.program(2, 0x12);
    f.msix.raise(1);
    f.msix.raise(2);
    f.msix.raise(4);
    assert!(f.delivered().is_empty());
    assert_eq!(f.pending(0), 0b1_0110);
    let before = f.route_calls();
    f.msix.set_control(CONTROL_ENABLE);
    assert_eq!(f.delivered(), [0x11, 0x12]);
    assert_eq!(f.pending(0), 0b1_0000, "its own mask is still set");
    assert_eq!(f.route_calls(), before + 1, "one new table for all vectors");
}

#[test]
fn disabling_gives_everything_back() {
    let f = fixture();
    f.msix.set_control(CONTROL_ENABLE);
    f.program(1, 0x11);
    f.mask(2, true);
    f.msix.raise(2);
    f.msix.set_control(0);
    assert!(f.hypervisor.state.lock().unwrap().irqs.is_empty());
    assert_eq!(f.pending(0), 0);
    f.msix.raise(1);
    f.msix.set_control(CONTROL_ENABLE);
    assert!(f.delivered().is_empty());
    f.msix.raise(1);
    assert_eq!(f.delivered(), [0x11]);
}

#[test]
fn the_table_keeps_what_it_should() {
    let f = fixture();
    f.msix.write(TABLE + 16, &[0xff; 16]);
    let mut data = [0; 16];
    f.msix.read(TABLE + 16, &mut data);
    assert_eq!(data[..12], [0xff; 12]);
    assert_eq!(data[12..], [1, 0, 0, 0], "only the mask bit");
    f.msix.read(TABLE, &mut data);
    assert_eq!(data[12..], [1, 0, 0, 0], "masked at start");
    f.msix.write(PBA, &[0xff; 8]);
    assert_eq!(f.pending(0), 0, "read-only");
    // Across the end of the table.
    f.msix.write(TABLE + 16 * u64::from(VECTORS) - 4, &[0; 8]);
    f.msix.read(TABLE + 16 * u64::from(VECTORS) - 4, &mut data);
    assert_eq!(data, [0; 16]);
}

#[test]
fn a_refused_routing_table_is_survived() {
    let f = fixture();
    f.msix.set_control(CONTROL_ENABLE);
    f.hypervisor.state.lock().unwrap().refuse_routes = true;
    f.program(0, 1);
    f.msix.raise(0);
    f.hypervisor.state.lock().unwrap().refuse_routes = false;
    f.delivered();
    f.program(0, 2);
    f.msix.raise(0);
    assert_eq!(f.delivered(), [2]);
}

struct Function(Arc<Msix>);

impl PciFunction for Function {
    fn name(&self) -> &str {
        "msix"
    }

    fn identity(&self) -> Identity {
        Identity {
            vendor: 1,
            device: 2,
            ..Identity::default()
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        let kind = BarKind::Memory32;
        vec![BarSpec {
            index: 0,
            kind,
            size: 0x1000,
            prefetchable: false,
        }]
    }

    fn msix(&self) -> Option<Arc<Msix>> {
        Some(Arc::clone(&self.0))
    }

    fn bar_write(&self, _bar: usize, offset: u64, _data: &[u8]) {
        panic!("{offset:#x} belongs to MSI-X");
    }
}

#[test]
fn the_bus_serves_capability_and_table() {
    let f = fixture();
    let spec = PciBusSpec {
        ecam: 0xe000_0000,
        mmio32: 0xc000_0000..0xc001_0000,
        mmio64: None,
    };
    let bus = PciBus::new(spec);
    bus.add(Some(0), Arc::new(Function(Arc::clone(&f.msix))))
        .unwrap();
    let write = |address: u64, value: u32| assert!(bus.mmio_write(address, &value.to_le_bytes()));
    let read = |address: u64| {
        let mut data = [0; 4];
        assert!(bus.mmio_read(address, &mut data));
        u32::from_le_bytes(data)
    };
    assert_eq!(read(0xe000_0034), 0x40);
    assert_eq!(read(0xe000_0040), u32::from(VECTORS - 1) << 16 | 0x11);
    assert_eq!(read(0xe000_0044), TABLE as u32);
    assert_eq!(read(0xe000_0048), PBA as u32);
    write(0xe000_0004, 2);
    write(0xc000_0000 + TABLE as u32 as u64, 0xfee0_0000);
    write(0xc000_0008 + TABLE, 0x55);
    write(0xc000_000c + TABLE, 0);
    write(0xe000_0040, 0xffff_0000);
    assert_eq!(read(0xe000_0040) >> 16, 0xc000 | u32::from(VECTORS - 1));
    write(0xe000_0040, 0x8000_0000);
    f.msix.raise(0);
    assert_eq!(f.delivered(), [0x55]);
}
