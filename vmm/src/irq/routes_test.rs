use super::fake::FakeHypervisor;
use super::{FIRST_MSI_GSI, IrqError, MsiMessage, MsiVector, Route};

fn msi_routes(fake: &FakeHypervisor) -> Vec<(u32, MsiMessage)> {
    let state = fake.state.lock().unwrap();
    state
        .routes
        .iter()
        .filter_map(|r| match r {
            Route::Msi { gsi, message } => Some((*gsi, *message)),
            Route::Pin { .. } => None,
        })
        .collect()
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data,
    }
}

#[test]
fn pins_are_installed_and_survive_every_replacement() {
    let (fake, routes) = FakeHypervisor::new();
    let pins = |n| {
        let state = fake.state.lock().unwrap();
        assert_eq!(state.route_calls, n);
        state
            .routes
            .iter()
            .filter(|r| matches!(r, Route::Pin { .. }))
            .count()
    };
    assert_eq!(pins(1), 38);
    let _vector = MsiVector::new(&routes, message(0x41)).unwrap();
    routes.commit().unwrap();
    assert_eq!(pins(2), 38);
}

#[test]
fn changes_are_batched_until_commit() {
    let (fake, routes) = FakeHypervisor::new();
    let a = routes.allocate().unwrap();
    let b = routes.allocate().unwrap();
    assert_eq!((a, b), (FIRST_MSI_GSI, FIRST_MSI_GSI + 1));
    routes.set(a, message(1));
    routes.set(b, message(2));
    assert_eq!(fake.state.lock().unwrap().route_calls, 1);
    routes.commit().unwrap();
    assert_eq!(msi_routes(&fake), [(a, message(1)), (b, message(2))]);
    routes.set(a, message(1));
    routes.commit().unwrap();
    assert_eq!(
        fake.state.lock().unwrap().route_calls,
        2,
        "an equal message costs no call"
    );
}

#[test]
fn freed_numbers_are_used_again() {
    let (_fake, routes) = FakeHypervisor::new();
    let first = routes.allocate().unwrap();
    let _second = routes.allocate().unwrap();
    routes.free(first);
    assert_eq!(routes.allocate().unwrap(), first);
}

#[test]
fn a_refused_table_is_tried_again() {
    let (fake, routes) = FakeHypervisor::new();
    let gsi = routes.allocate().unwrap();
    routes.set(gsi, message(7));
    fake.state.lock().unwrap().refuse_routes = true;
    assert!(matches!(
        routes.commit(),
        Err(IrqError::Routing { entries: 39, .. })
    ));
    fake.state.lock().unwrap().refuse_routes = false;
    routes.commit().unwrap();
    assert_eq!(msi_routes(&fake), [(gsi, message(7))]);
}

#[test]
fn routes_run_out_with_an_error() {
    let (_fake, routes) = FakeHypervisor::new();
    let error = loop {
        if let Err(e) = routes.allocate() {
            break e;
        }
    };
    assert!(matches!(error, IrqError::Exhausted(4000)), "{error}");
}

#[test]
fn a_vector_raises_its_message_and_cleans_up() {
    let (fake, routes) = FakeHypervisor::new();
    let vector = MsiVector::new(&routes, message(0x31)).unwrap();
    routes.commit().unwrap();
    vector.raise();
    assert_eq!(fake.delivered(), [message(0x31)]);
    vector.set_message(message(0x32));
    routes.commit().unwrap();
    vector.raise();
    vector.raise();
    assert_eq!(fake.delivered(), [message(0x32)]);
    drop(vector);
    assert!(fake.state.lock().unwrap().irqs.is_empty());
    assert_eq!(routes.allocate().unwrap(), FIRST_MSI_GSI);
}
