//! `pod top`: the nodes of a pod as they are now, on a terminal that is drawn again and again.
//!
//! | module | what it holds |
//! |---|---|
//! | `model` | what is known, and what keys do |
//! | `view` | how it looks, on a terminal or as plain text |
//! | `feed` | where it comes from: a thread that asks the manager, and the next manager |

mod feed;
mod model;
mod view;

use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::place::Place;
use super::{Failure, TopArgs, print, status};
use feed::{Feed, News};
use model::{Model, Outcome};

/// How long a key may wait for its effect.
const KEY_EVERY: Duration = Duration::from_millis(50);
/// How often spans of time on the screen move.
const DRAW_EVERY: Duration = Duration::from_millis(250);

pub(super) fn top(base: &Path, args: &TopArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let interval = args.interval.max(Duration::from_millis(100));
    if args.once || args.batch || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return plain(&place, interval, args.batch);
    }
    // Before the screen is taken: complaints belong on the terminal as it was.
    place.connect()?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, stop.clone())
            .map_err(|e| Failure::general(format!("cannot watch signals: {e}")))?;
    }
    let mut terminal =
        ratatui::try_init().map_err(|e| Failure::general(format!("the terminal: {e}")))?;
    let done = screen(&mut terminal, &place, interval, &stop);
    ratatui::restore();
    done.map_err(|e| Failure::general(format!("the terminal: {e}")))?;
    Ok(status::OK)
}

/// The screen, until somebody has seen enough.
fn screen(
    terminal: &mut DefaultTerminal,
    place: &Place,
    interval: Duration,
    stop: &AtomicBool,
) -> io::Result<()> {
    let feed = Feed::start(place.clone(), interval)?;
    let mut model = Model::new(&place.name);
    let mut drawn: Option<Instant> = None;
    while !stop.load(Ordering::Relaxed) {
        let mut changed = false;
        while let Ok(news) = feed.news.try_recv() {
            model.learn(news, Instant::now());
            changed = true;
        }
        if event::poll(KEY_EVERY)? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    match model.key(key) {
                        Outcome::Stay => {}
                        Outcome::Quit => return Ok(()),
                        Outcome::Do(order) => feed.order(order),
                    }
                    changed = true;
                }
                Event::Resize(..) => changed = true,
                _ => {}
            }
        }
        if changed || drawn.is_none_or(|then| then.elapsed() >= DRAW_EVERY) {
            let now = Instant::now();
            terminal.draw(|frame| view::draw(frame, &mut model, now))?;
            drawn = Some(now);
        }
    }
    Ok(())
}

/// Plain text: one frame, or one every interval. Shares of time need two looks.
fn plain(place: &Place, interval: Duration, again: bool) -> Result<i32, Failure> {
    place.connect()?;
    let feed = Feed::start(place.clone(), interval)
        .map_err(|e| Failure::general(format!("cannot ask the manager: {e}")))?;
    let mut model = Model::new(&place.name);
    let mut looks = 0;
    let mut alone = 0;
    loop {
        let news = match feed
            .news
            .recv_timeout(interval * 4 + Duration::from_secs(5))
        {
            Ok(news) => news,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let message = format!("pod {}: the manager does not answer", place.name);
                return Err(Failure::new(status::TIMEOUT, message));
            }
        };
        let (look, absent) = (
            matches!(news, News::Status(_)),
            matches!(news, News::NoManager(_)),
        );
        model.learn(news, Instant::now());
        if absent {
            alone += 1;
            if !again || alone > 3 {
                return Err(place.not_running());
            }
        }
        if !look {
            continue;
        }
        alone = 0;
        looks += 1;
        if looks == 1 {
            continue;
        }
        print(&view::text(&model, Instant::now()))?;
        if !again {
            return Ok(status::OK);
        }
        print("\n")?;
    }
}

#[cfg(test)]
mod top_test;
